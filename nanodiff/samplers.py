"""From noise to images: DDPM and DDIM are one loop over a list of (time, previous time) pairs.

x0 = the network's idea of the image, clipped to [-1, 1]
x  = w0 x0 + wx x + sigma z              (`Diffusion.step_back`; eta = 0: DDIM, eta = 1: DDPM)
"""

import contextlib
import math

import numpy as np

from nanodiff.context import NanodiffError
from nanodiff.kernels.random_ref import SAMPLE, START, normal

SPACINGS = {  # index i of n, T times -> t
    "trailing": lambda i, n, T: round(T * (n - i) / n) - 1,
    "leading": lambda i, n, T: (T // n) * (n - 1 - i),
    "linspace": lambda i, n, T: round((T - 1) * (n - 1 - i) / (n - 1)) if n > 1 else T - 1,
}


def step_list(T, n, spacing="trailing"):
    """n pairs (t, previous t) out of 0 .. T-1, strictly decreasing; the last previous t is -1, the image.

    "trailing" and "linspace" start at T-1, where the process is pure noise; "linspace" also visits 0.
    "leading" starts at (T // n) (n - 1), where it is not: it is here to reproduce what others made. The
    names are those of Lin et al. 2023 (arXiv:2305.08891). NanodiffError: n is no integer in 1 .. T, or the
    spacing is not known.
    """
    if spacing not in SPACINGS:
        raise NanodiffError(f"spacing {spacing!r} is not known; use one of {', '.join(SPACINGS)}")
    _need_int("steps", n, 1, T)
    times = [SPACINGS[spacing](i, n, T) for i in range(n)]
    return list(zip(times, [*times[1:], -1]))


def ddim_sample(
    model, diff, shape, steps=50, eta=0.0, seed=0, clip=True, callback=None, labels=None, first=0,
    spacing="trailing",
):  # fmt: skip
    """Images by DDIM (Song, Meng and Ermon 2020, arXiv:2010.02502): good ones in few steps.

    model     a UNet, or any callable (x, t) -> prediction over NumPy arrays, x float32 of `shape`, t int64
              (B,); with labels it is called as (x, t, labels)
    diff      the Diffusion that the model was trained with
    shape     (B, H, W, C); a callable may take any shape that starts with B
    steps     1 .. diff.timesteps;  spacing: see `step_list`
    eta       0 .. 1: how much noise is drawn anew at each step; at 0 the image is a function of the start
    seed      0 .. 2^64 - 1. Image k of a seed is the same in any batch; the k of this batch start at `first`
    clip      hold the predicted image in [-1, 1] at every step
    callback  called as callback(i, n, t, x, x0) after step i of n, which left time t: NumPy arrays of
              `shape`, the images so far and the predicted ones, which are not touched again
    labels    (B,) class numbers, for a network with classes
    returns   float32 NumPy array of `shape`, in [-1, 1] where clip
    errors    NanodiffError: an argument out of its range, or samples that are not finite
    """
    if not isinstance(eta, (int, float, np.number)) or not 0 <= eta <= 1:
        raise NanodiffError(f"eta = {eta!r}: must be a number from 0 (DDIM) to 1 (DDPM)")
    pairs = step_list(diff.timesteps, steps, spacing)
    return _sample(model, diff, shape, pairs, eta, seed, clip, callback, labels, first)


def ddpm_sample(
    model, diff, shape, steps=None, seed=0, clip=True, callback=None, labels=None, first=0,
    spacing="trailing",
):  # fmt: skip
    """Images by DDPM's ancestral sampling (Ho, Jain and Abbeel 2020, arXiv:2006.11239, algorithm 2).

    The variance is the posterior's, "fixed small", of the steps that are taken; None takes all. Other
    arguments and result as in `ddim_sample`.
    """
    pairs = step_list(diff.timesteps, diff.timesteps if steps is None else steps, spacing)
    return _sample(model, diff, shape, pairs, 1.0, seed, clip, callback, labels, first)


def _sample(model, diff, shape, pairs, eta, seed, clip, callback, labels, first):
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not shape:
        raise NanodiffError("shape () has no samples: must be (B, H, W, C)")
    for n in shape:
        _need_int(f"a side of the shape {shape}", n, 1, 2**31 - 1)
    _need_int("seed", seed, 0, 2**64 - 1)
    _need_int("first", first, 0, 2**32 - shape[0])
    predict, draw, to_host, frozen = _adapt(model, labels)

    with frozen:
        x = draw(shape, seed, 0, START, first)
        for i, (t, p) in enumerate(pairs):
            pred = predict(x, np.full(shape[0], t))
            if pred.shape != shape:
                raise NanodiffError(f"the model answered shape {shape} with {pred.shape}: must be the same")
            a, s = math.sqrt(diff.alpha_bar[t]), math.sqrt(1 - diff.alpha_bar[t])
            wx, wp = map(np.float32, diff.x0_weights(a, s))
            x0 = wx * x + wp * pred
            if clip:
                x0 = x0.clip(-1, 1)
            w0, wx, sigma = map(np.float32, diff.step_back(t, p, eta))
            x = w0 * x0 + wx * x
            if sigma:
                x += sigma * draw(shape, seed, t, SAMPLE, first)
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


def _adapt(model, labels):
    """(predict(x, t), draw, to_host, a context) of a UNet, or of a plain callable over NumPy arrays."""
    if hasattr(model, "predict"):
        ctx = model.ctx
        return lambda x, t: model.predict(x, t, labels), ctx.k.normal, ctx.to_host, model.frozen()
    more = () if labels is None else (labels,)

    def predict(x, t):
        return np.asarray(model(x, t, *more), np.float32)

    return predict, normal, np.asarray, contextlib.nullcontext()


def _need_int(name, value, low, high):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not low <= value <= high:
        raise NanodiffError(f"{name} = {value!r}: must be an integer from {low} to {high}")
