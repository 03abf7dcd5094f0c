"""From noise to images, and back: DDPM, DDIM and DPM-Solver++ over one loop and one list of steps."""

import contextlib
import math

import numpy as np

from nanodiff import graph
from nanodiff.context import NanodiffError
from nanodiff.kernels.random_ref import SAMPLE, START, normal


def _quadratic(n, T):  # rising; a square would visit some low times twice: each is moved above the last
    times = [-1]
    for i in range(n):
        times.append(max(round((T - 1) * (i / max(n - 1, 1)) ** 2), times[-1] + 1))
    return times[1:] if n > 1 else [T - 1]


SPACINGS = {  # (n, T) -> n times, rising
    "trailing": lambda n, T: [round(T * (n - i) / n) - 1 for i in reversed(range(n))],
    "leading": lambda n, T: [T // n * i for i in range(n)],
    "linspace": lambda n, T: [round((T - 1) * i / (n - 1)) for i in range(n)] if n > 1 else [T - 1],
    "quadratic": _quadratic,
}


def step_list(T, n, spacing="trailing"):
    """Pairs (t, previous t) out of 0 .. T-1, strictly decreasing; the last previous t is -1, the image.

    n        how many; or counts such as (10, 15, 20): [0, T) is cut into as many equal sections, and each
             gets so many evenly spaced times, both its ends included (Nichol and Dhariwal 2021); or None
             with a `spacing` that lists the times itself
    spacing  "trailing" and "linspace" start at T-1, where the process is pure noise; "linspace" also visits 0
             (names: Lin et al. 2023, arXiv:2305.08891). "leading" starts at (T // n) (n - 1), where it is
             not: it is here to reproduce what others made. "quadratic" starts at T-1 and is dense near 0
             (Song et al. 2020, appendix D.2). Or the times to visit, in falling order.
    NanodiffError: n is no integer in 1 .. T, or the spacing is not known.
    """
    if isinstance(spacing, (list, tuple, np.ndarray)):
        times = [int(t) for t in spacing]
        if n not in (None, len(times)):
            raise NanodiffError(f"steps = {n!r}: must be None, as spacing lists {len(times)} times")
        falling = all(a > b for a, b in zip(times, times[1:]))
        if not times or list(spacing) != times or not falling or times[0] >= T or times[-1] < 0:
            raise NanodiffError(f"spacing {list(spacing)!r}: must be falling integers from {T - 1} to 0")
    elif not isinstance(spacing, str) or spacing not in SPACINGS:
        raise NanodiffError(f"spacing {spacing!r} is not known; use one of {', '.join(SPACINGS)}, or times")
    elif isinstance(n, (list, tuple)):
        if not n:
            raise NanodiffError("steps = (): must have a count for each section")
        starts = [T * k // len(n) for k in range(len(n) + 1)]
        times = []
        for count, low, high in zip(n, starts, starts[1:]):
            _need_int("steps of a section", count, 1, high - low)
            times += [low + t for t in SPACINGS["linspace"](count, high - low)]
        times = times[::-1]
    else:
        _need_int("steps", n, 1, T)
        times = SPACINGS[spacing](n, T)[::-1]
    return list(zip(times, [*times[1:], -1]))


def ddim_sample(
    model, diff, shape, steps=50, eta=0.0, seed=0, clip=True, callback=None, labels=None, first=0,
    spacing="trailing", noise_stop=None, eta_stop=None, **options,
):  # fmt: skip
    """Images by DDIM (Song, Meng and Ermon 2020, arXiv:2010.02502): good ones in few steps.

    steps, spacing   see `step_list`;  all other arguments and errors: see `sample`
    eta         0 .. 1: how much noise is drawn anew at each step; at 0 the image is a function of the start
    eta_stop    a time: eta is 0 from there on. The noise in x stays what the schedule says
    noise_stop  a time: from there on no noise is drawn, and yet room is left for it. Its place stays empty,
                so that the noise in x falls below the schedule (cosine, T = 1000, stopped at 900: to 0.16 of
                it after 400 steps) and images come out smooth and alike. The trick of the project that
                nanodiff grew from; eta_stop is its right form.
    """
    if not isinstance(eta, (int, float, np.number)) or not 0 <= eta <= 1:
        raise NanodiffError(f"eta = {eta!r}: must be a number from 0 (DDIM) to 1 (DDPM)")
    for name, stop in (("noise_stop", noise_stop), ("eta_stop", eta_stop)):
        if stop is not None:
            _need_int(name, stop, -1, diff.timesteps)

    def rule(t, p, v):
        w0, wx, sigma = diff.step_back(t, p, 0.0 if eta_stop is not None and t <= eta_stop else eta)
        return w0, wx, 0.0 if noise_stop is not None and t <= noise_stop else sigma

    pairs = step_list(diff.timesteps, steps, spacing)
    return sample(model, diff, shape, pairs, rule, seed, clip, callback, labels, first, **options)


def ddpm_sample(
    model, diff, shape, steps=None, seed=0, clip=True, callback=None, labels=None, first=0,
    spacing="trailing", **options,
):  # fmt: skip
    """Images by DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, arXiv:2006.11239, algorithm 2).

    The variance is the one that diff.variance names, of the steps that are taken; None takes all. With few
    steps "fixed_large" is noisy (Song et al. 2020, table 1). All other arguments and errors: see `sample`.
    """

    def rule(t, p, v):
        w0, wx, _ = diff.step_back(t, p, 1.0)
        return w0, wx, diff.ancestral_sigma(t, p, v)

    steps = diff.timesteps if steps is None and isinstance(spacing, str) else steps
    pairs = step_list(diff.timesteps, steps, spacing)
    return sample(model, diff, shape, pairs, rule, seed, clip, callback, labels, first, **options)


def dpm_sample(
    model, diff, shape, steps=20, seed=0, clip=True, callback=None, labels=None, first=0,
    spacing="trailing", **options,
):  # fmt: skip
    """Images by DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order, no noise.

    In lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) the step of DDIM with eta = 0 is exact for an x0
    that does not change. It does: along the line through this x0 and the last one. Half way through the step
    the line stands at
        x0 + (x0 - last x0) h / (2 h_last),        h = lambda_p - lambda_t
    so DDIM is given that. The first step has no last one, and the step to the image (lambda infinite) takes
    x0 as it is. All arguments and errors: see `step_list` and `sample`.
    """
    with np.errstate(divide="ignore"):
        snr = diff.alpha_bar / (1 - diff.alpha_bar)
        lam = (
            np.log(snr) / 2
        )  # -inf where the schedule ends in pure noise: then h_last is inf and h / h_last 0
    pairs, ahead, last = step_list(diff.timesteps, steps, spacing), {}, None
    for t, p in pairs:
        h = lam[p] - lam[t] if p >= 0 else None
        ahead[t], last = h / (2 * last) if h and last else 0.0, h

    def rule(t, p, v):
        return diff.step_back(t, p, 0.0)

    return sample(
        model, diff, shape, pairs, rule, seed, clip, callback, labels, first, ahead=ahead.get, **options
    )


def ddim_invert(model, diff, images, steps=50, spacing="trailing", refine=1, labels=None):
    """The noise that DDIM with eta = 0 makes `images` of: its steps walked from the image to the start.

    DDIM's step from t to p is x_p / a_p = x_t / a_t + (s_p / a_p - s_t / a_t) eps(x_t, t), with a =
    sqrt(alpha_bar), s = sqrt(1 - alpha_bar). Solved for x_t it needs eps at the x_t that is sought: taken
    first at x_p, then `refine` - 1 more times at the last answer, a fixed-point iteration. It converges where
    the network is smooth; trained ones often are not near the image, and there more steps help, not this.

    images   (B,H,W,C) floats in [-1, 1];  steps, spacing, labels: of the sampling to be inverted
    returns  float32 NumPy array: ddim_sample(..., start=it, clip=False) comes back to about `images`
    """
    _need_int("refine", refine, 1, 1000)
    x = np.asarray(images, np.float32)
    predict, _, _, frozen = _adapt(model, labels, None)
    with frozen:
        for t, p in reversed(step_list(diff.timesteps, steps, spacing)):
            now, then = diff.alpha_bar[t], diff.alpha_bar[p] if p >= 0 else 1.0
            a, s = math.sqrt(now), math.sqrt(1 - now)
            ex, ep = map(np.float32, diff.eps_weights(a, s))
            keep = math.sqrt(now / then)
            keep, add = np.float32(keep), np.float32(s - keep * math.sqrt(1 - then))
            before = x
            for _ in range(refine):
                x = keep * before + add * (ex * x + ep * predict(x, np.full(len(x), t))[..., : x.shape[-1]])
    return x


def sample(
    model, diff, shape, pairs, rule, seed=0, clip=True, callback=None, labels=None, first=0,
    dynamic=None, guidance=None, start=None, edit=None, ahead=None,
):  # fmt: skip
    """The loop of every sampler: predict, make x0 of it, hold it in range, step back.

    model     a UNet, or any callable (x, t) -> prediction over NumPy arrays, x float32 of `shape`, t int64
              (B,); with labels it is called as (x, t, labels)
    diff      the Diffusion that the model was trained with
    shape     (B, H, W, C); a callable may take any shape that starts with B
    pairs     [(t, p), ...] as from `step_list`
    rule      (t, p, v) -> (w0, wx, sigma): x_p = w0 x0 + wx x_t + sigma z. v: the second half of the
              network's channels with variance "learned_range", else None
    seed      0 .. 2^64 - 1. Image k of a seed is the same in any batch; this batch's k start at `first`
    clip      hold the predicted image in [-1, 1] at every step; a number c: in [-c, c]; False: leave it
    dynamic   a share such as 0.995: clip at that quantile of |x0| and divide by it where it is above 1, in
              place of `clip` (dynamic thresholding, Saharia et al. 2022, arXiv:2205.11487, section 2.3)
    callback  called as callback(i, n, t, x, x0) after step i of n, which left time t: NumPy arrays of
              `shape`, the images so far and the predicted ones, which are not touched again
    labels    (B,) class numbers, for a network with classes
    guidance  a factor g: the prediction is u + g (c - u), c with the labels and u without: with the network's
              last class, "none" (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598). A
              callable is called without labels for u
    start     x at the first time of `pairs`, not pure noise: an image that was noised, or `ddim_invert`
    edit      (x, p) -> x: what to make of x after each step, which led to time p; NumPy arrays
    ahead     t -> c or None: step with x0 + c (x0 - last x0) (`dpm_sample`)
    returns   float32 NumPy array of `shape`, in [-1, 1] where clip
    errors    NanodiffError: an argument out of its range, or samples that are not finite
    """
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not shape:
        raise NanodiffError("shape () has no samples: must be (B, H, W, C)")
    for n in shape:
        _need_int(f"a side of the shape {shape}", n, 1, 2**31 - 1)
    _need_int("seed", seed, 0, 2**64 - 1)
    _need_int("first", first, 0, 2**32 - shape[0])
    for name, value, high in (("clip", clip, math.inf), ("dynamic", dynamic, 1)):
        if value is not None and not (isinstance(value, (bool, int, float)) and 0 <= value <= high):
            raise NanodiffError(f"{name} = {value!r}: must be a number above 0, at most {high}, or left out")
    if guidance is not None and (labels is None or not isinstance(guidance, (int, float))):
        raise NanodiffError(f"guidance = {guidance!r}: must be a number, with labels to be guided by")
    if start is not None and np.shape(start) != shape:
        raise NanodiffError(f"start has shape {np.shape(start)}: must be {shape}")
    predict, draw, to_host, frozen = _adapt(model, labels, guidance)
    learned = diff.variance == "learned_range"
    answer = (*shape[:-1], 2 * shape[-1]) if learned else shape

    with frozen:
        x = draw(shape, seed, 0, START, first) if start is None else np.asarray(start, np.float32)
        last = None
        plain = not (learned or dynamic or edit or ahead or guidance is not None)
        recorded = graph.sampling(model, x, float(clip or 0), labels) if plain else None  # on the GPU
        for i, (t, p) in enumerate(pairs):
            a, s = math.sqrt(diff.alpha_bar[t]), math.sqrt(1 - diff.alpha_bar[t])
            wx, wp = map(np.float32, diff.x0_weights(a, s))
            if recorded:
                w0, w, sigma = rule(t, p, None)
                z = model.ctx.k.normal(shape, seed, t, SAMPLE, first) if sigma else None
                x, x0 = recorded.step(t, (wx, wp, w0, w, sigma), z)
            else:
                pred = predict(x, np.full(shape[0], t))
                if pred.shape != answer:
                    raise NanodiffError(
                        f"the model answered shape {shape} with {pred.shape}: must be {answer}"
                    )
                v = pred[..., shape[-1] :] if learned else None
                pred = pred[..., : shape[-1]] if learned else pred
                x0 = wx * x + wp * pred
                if dynamic:
                    x0 = _threshold(x0, dynamic)
                elif clip:
                    x0 = x0.clip(-float(clip), float(clip))
                w0, wx, sigma = rule(t, p, v)
                c = ahead(t) if ahead else None
                aim = x0 + np.float32(c) * (x0 - last) if c else x0
                last = x0
                x = np.float32(w0) * aim + np.float32(wx) * x
                if not isinstance(sigma, float) or sigma:
                    sigma = np.float32(sigma) if isinstance(sigma, float) else sigma
                    x += sigma * draw(shape, seed, t, SAMPLE, first)
            if edit:
                x = np.asarray(edit(x, p), np.float32)
            if callback:
                callback(i, len(pairs), t, to_host(x), to_host(x0))

    x = to_host(x).astype(np.float32, copy=False)
    bad = [first + k for k in range(shape[0]) if not np.isfinite(x[k]).all()]
    if bad:
        raise NanodiffError(
            f"{len(bad)} of {shape[0]} samples are not finite (number {bad[0]} is one): the model gave "
            f"NaN or infinity; check its weights, and that it was trained to predict {diff.prediction!r}"
        )
    return x


def _threshold(x0, ratio):
    """Each sample held in [-s, s] and divided by s, its `ratio` quantile of |x0|, at least 1."""
    s = np.quantile(np.abs(x0).reshape(len(x0), -1), ratio, axis=1).clip(1, None).astype(np.float32)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clip(-s, s) / s


def _adapt(model, labels, guidance):
    """(predict(x, t), draw, to_host, a context) of a UNet, or of a callable. predict and draw give NumPy
    arrays: what no recorded step of a GPU does between two predictions is the host's work."""
    draw, to_host, frozen, none = normal, np.asarray, contextlib.nullcontext(), None
    if hasattr(model, "predict"):
        ctx, to_host, frozen = model.ctx, model.ctx.to_host, model.frozen()
        draw = normal if ctx.device == "gpu" else ctx.k.normal
        if guidance is not None:
            rows = model.config.num_class_embeds
            if not rows or model.config.class_embed_type:
                raise NanodiffError(f"guidance = {guidance}: needs a network with a table of classes")
            none = np.full(len(labels), rows - 1)

    def ask(x, t, labels):
        if hasattr(model, "predict"):
            return to_host(model.predict(x, t, labels))
        return np.asarray(model(x, t) if labels is None else model(x, t, labels), np.float32)

    def predict(x, t):
        if guidance is None:
            return ask(x, t, labels)
        without = ask(x, t, none)
        return without + np.float32(guidance) * (ask(x, t, labels) - without)

    return predict, draw, to_host, frozen


def _need_int(name, value, low, high):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise NanodiffError(f"{name} = {value!r}: must be an integer from {low} to {high}")
