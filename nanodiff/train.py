"""Training: one step, and the loop around it, flat, for the loop is the documentation.

NumPy and the kernels are imported inside the functions: the command line reads TrainSettings from here, and
`python -m nanodiff --help` must not wait for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# What a setting left at None becomes, by the name of the data; "other" fills what a set leaves open.
PRESETS = {
    "glyphs": dict(steps=1500, channels=(16, 32, 64), layers=1, lr=2e-3),
    "mnist": dict(steps=7000, channels=(32, 64, 128), layers=1, attention=1, lr=1.5e-3, labels=True),
    "cifar10": dict(steps=100_000, batch=64, channels=(64, 128, 256), lr=3e-4, ema=0.9995),
    "other": dict(
        steps=20_000,
        batch=32,
        channels=(32, 64, 128, 128),
        layers=2,
        attention=1,
        lr=5e-4,
        ema=0.999,
        labels=False,
    ),
}
GROUPS, HEAD = 8, 32  # of every GroupNorm; widest attention head
PREVIEWS, PREVIEW_STEPS, FINAL_STEPS = 16, 20, 50  # images, DDIM steps while training, DDIM steps at the end
PATIENCE = 5  # skipped steps in a row that end a run
FREE = {
    "data",
    "out",
    "device",
    "dtype",
    "threads",
    "log_every",
    "sample_every",
    "save_every",
    "samples",
}  # on resuming


def _setting(default, kind, help, low=None, high=math.inf, choices=None):
    return field(default=default, metadata=dict(kind=kind, help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run, checked when made (NanodiffError). None: chosen by the data (PRESETS), or off.

    The command line makes a flag of each. `size` and `channels` also take text: "28x20", "32,64,128".
    """

    data: str = _setting("glyphs", str, "glyphs, mnist, cifar10, a folder of images, or an .npz file")
    out: str | None = _setting(None, str, "run folder (default: runs/<data>); one that holds a run goes on")
    steps: int | None = _setting(None, int, "training steps in all, earlier runs included", 1, 10**8 - 1)
    batch: int | None = _setting(None, int, "images per step", 1)
    lr: float | None = _setting(None, float, "peak learning rate of Adam", 0, 1)
    warmup: int = _setting(100, int, "steps over which the learning rate rises to its peak", 0)
    decay: str = _setting(
        "cosine", str, "of the rate after it, to 0 at --steps", choices=("cosine", "constant")
    )
    clip: float = _setting(1.0, float, "largest norm of the gradient; 0: any", 0)
    ema: float | None = _setting(None, float, "largest decay of the averaged weights; 0: none", 0, 0.999999)
    seed: int = _setting(0, int, "of weights, order, noise and samples", 0, 2**64 - 1)
    device: str = _setting("cpu", str, "ref is slow plain NumPy", choices=("cpu", "gpu", "cuda", "ref"))
    dtype: str | None = _setting(
        None,
        str,
        "of activations on the GPU (default: bfloat16 where it has it)",
        choices=("bfloat16", "float32"),
    )
    threads: int | None = _setting(None, int, "CPU threads; the results do not depend on it", 1)
    size: tuple | None = _setting(None, tuple, "side or HxW to make the images (default: as they are)", 1)
    flip: bool = _setting(False, bool, "mirror half of the images, anew at every step")
    channels: tuple | None = _setting(None, tuple, "widths of the UNet's levels, such as 32,64,128", 1)
    layers: int | None = _setting(None, int, "residual blocks per level", 1)
    attention: int | None = _setting(None, int, "how many of the deepest levels have attention", 0)
    labels: bool | None = _setting(None, bool, "tell the network the class of every image")
    dropout: float = _setting(0.0, float, "share of activations dropped in residual blocks", 0, 0.95)
    label_drop: float = _setting(0.0, float, "share of images whose class is not told, for guidance", 0, 0.95)
    schedule: str = _setting(
        "cosine",
        str,
        "of the noise",
        choices=("cosine", "linear", "scaled_linear", "sigmoid", "sigmoid_beta"),
    )
    zero_snr: bool = _setting(False, bool, "rescale the schedule, so that its last step is pure noise")
    prediction: str = _setting("v", str, "what the network predicts", choices=("v", "eps", "x0"))
    variance: str = _setting(
        "fixed_small",
        str,
        "of a step of DDPM; learned_range: by the network, for the bound",
        choices=("fixed_small", "fixed_large", "learned_range"),
    )
    timesteps: int = _setting(1000, int, "steps of the noise schedule", 1)
    min_snr: float | None = _setting(None, float, "weigh the loss by min(SNR, this); 5 is usual", 0.01)
    offset_noise: float = _setting(
        0.0, float, "noise of this size on each channel's mean; 0.1 is usual", 0, 1
    )
    log_every: int = _setting(20, int, "steps per line of stats.jsonl", 1, 100_000)
    sample_every: int = _setting(500, int, "steps between sample grids", 1)
    save_every: int = _setting(500, int, "steps between checkpoints", 1)
    samples: int = _setting(64, int, "images in the final grid", 1)

    def __post_init__(self):
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            kind, low, high = rule["kind"], rule["low"], rule["high"]
            if value is None and f.default is None:
                continue
            if kind is tuple:
                with contextlib.suppress(ValueError, TypeError):
                    value = (
                        str(value).replace("x", ",").split(",") if isinstance(value, (str, int)) else value
                    )
                    value = tuple(map(int, value)) * (2 if f.name == "size" and len(value) == 1 else 1)
                    object.__setattr__(self, f.name, value)
            limit, numbers = None, value if kind is tuple else (value,)
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (
                kind is bool
            ):
                limit = {tuple: "integers such as 32,64 or 28x20", str: "text", int: "an integer"}.get(
                    kind, kind.__name__
                )
            elif rule["choices"] and value not in rule["choices"]:
                limit = f"one of {', '.join(rule['choices'])}"
            elif low is not None and not all(low <= n <= high for n in numbers):
                limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            elif f.name == "size" and len(value) != 2:
                limit = "one side or HxW, such as 28x20"
            if limit:
                raise _error(f"{f.name} = {value!r}: must be {limit}")

    def for_data(self, name):
        """These settings, what was left open chosen for the data `name`."""
        preset = {**PRESETS["other"], **PRESETS.get(name, {})}
        return replace(self, **{key: value for key, value in preset.items() if getattr(self, key) is None})


def _error(text):
    from nanodiff.context import NanodiffError

    return NanodiffError(text)


def unet_config(s, H, W, C, classes=0):
    """UNetConfig of a run with settings `s` on images (H, W, C) of so many classes (0: none are told)."""
    from nanodiff.unet import UNetConfig

    levels, deep = len(s.channels), s.attention
    if deep > levels:
        raise _error(f"attention = {deep}: must be from 0 to {levels}, the levels in --channels")
    stride = 2 ** (levels - 1)
    if H % stride or W % stride:
        near = "x".join(str(max(1, round(side / stride)) * stride) for side in (H, W))
        remedy = f"use --size {near} or fewer --channels"
        raise _error(f"images are {H}x{W}: {levels} levels need sides divisible by {stride}; {remedy}")
    head = math.gcd(HEAD, *s.channels[-max(deep, 1) :])  # divides every width that has attention
    return UNetConfig(
        sample_size=H if H == W else (H, W), in_channels=C, block_out_channels=s.channels,
        out_channels=2 * C if s.variance == "learned_range" else C,
        layers_per_block=s.layers, dropout=s.dropout, norm_num_groups=GROUPS, attention_head_dim=head,
        down_block_types=("DownBlock2D",) * (levels - deep) + ("AttnDownBlock2D",) * deep,
        up_block_types=("AttnUpBlock2D",) * deep + ("UpBlock2D",) * (levels - deep),
        num_class_embeds=classes or None,
    )  # fmt: skip


def train_step(
    model, opt, diff, x0, labels=None, key=None, lr=None, min_snr=None, offset_noise=0.0, label_drop=0.0
):
    """One step of training (Ho et al. 2020, algorithm 1); returns the loss, a float.

    x0      (B,H,W,C) float images in [-1, 1], of the host or the device
    labels  (B,) integers, or None
    key     (seed, step): decides the diffusion times, the noise and the dropout; None: (0, steps done by opt)
    lr      learning rate of this step; None: the optimiser's own
    min_snr       weigh the loss: `Diffusion.loss_weight`
    offset_noise  add normals of this size to the noise, one for each sample and channel: a network learns to
                  move the mean of an image (Guttenberg 2023, "Diffusion with offset noise")
    label_drop    share of labels replaced by the network's last class, "none", for guidance when sampling

    With diff.variance "learned_range" the loss is `Diffusion.hybrid_loss`. A step whose loss or gradient is
    not finite changes no weight (`opt.state[3]` counts those).
    """
    import numpy as np

    from nanodiff.kernels.random_ref import LABEL, NOISE, OFFSET, TIME

    if getattr(x0, "ndim", 0) != 4 or x0.dtype.kind != "f":
        what = f"{x0.dtype} {x0.shape}" if hasattr(x0, "dtype") else type(x0).__name__
        raise _error(f"x0 is {what}: must be float (B,H,W,C) in [-1, 1]; data.to_float makes it of uint8")
    ctx, k, channels = model.ctx, model.ctx.k, model.config.out_channels
    learned = diff.variance == "learned_range"
    if channels != x0.shape[3] * (1 + learned):
        much = "twice the channels of x0 (learned_range)" if learned else "the channels of x0"
        raise _error(
            f"out_channels = {channels}: must be {x0.shape[3] * (1 + learned)}, {much}, to train on it"
        )
    if label_drop and (labels is None or not model.config.num_class_embeds or model.config.class_embed_type):
        raise _error(f"label_drop = {label_drop}: needs labels, and a network with a table of classes")
    if learned and min_snr is not None:
        raise _error(
            f"min_snr = {min_snr}: must be None with variance 'learned_range', whose loss has weights"
        )
    if key is None:
        key = (0, int(ctx.to_host(opt.state)[2:].sum()))
    x0 = ctx.to_device(x0)
    B = len(x0)
    t = spread_times(ctx.to_host(k.random_bits((1,), *key, TIME))[0], B, diff.timesteps)
    a, s = (ctx.to_device(scale) for scale in diff.scales(t))
    eps = ctx.to_device(k.normal(x0.shape, *key, NOISE))
    if offset_noise:
        means = ctx.to_host(k.normal((B, 1, 1, x0.shape[3]), *key, OFFSET))
        eps = ctx.to_device(ctx.to_host(eps) + x0.dtype.type(offset_noise) * means)
    if label_drop:
        drop = ctx.to_host(k.random_bits((B,), *key, LABEL)) < label_drop * 2**32
        labels = np.where(drop, model.config.num_class_embeds - 1, labels)
    xt, target = k.q_sample(x0, eps, a, s, diff.prediction)
    if learned:
        pred = model.forward(xt, t, labels, key=key)
        loss, dout = diff.hybrid_loss(*map(ctx.to_host, (pred, target, x0, xt)), t)
        loss = ctx.to_device(loss, np.float64)
        model.params.zero_grad()
        model.backward(dout)
    else:
        weight = None if min_snr is None else diff.loss_weight(t, min_snr)
        loss = model.loss_and_grad(xt, t, target, labels, key, weight)
    opt.step(loss, lr=lr)
    return float(ctx.to_host(loss)[0])


def spread_times(start, B, T):
    """B times spread evenly over [0, T) from one random start, a 32-bit word: each is uniform, and together
    they make a gradient with less noise than B independent ones (Kingma et al. 2021, arXiv:2107.00630,
    appendix I.1)."""
    import numpy as np

    return np.array([((int(start) + (i << 32) // B) % 2**32) * T >> 32 for i in range(B)])


def sample_images(
    model, diff, shape, count, sampler="ddim", batch=PREVIEWS, frames=None, tick=None, label=None,
    classes=None, **options,
):  # fmt: skip
    """`count` images of `shape` (H, W, C), drawn `batch` at a time; how many at a time changes none of them.

    sampler   "ddim", "ddpm" or "dpm";  options: what its function takes: steps, eta, seed, guidance, ...
    label     class of all images, for a network with classes; None: sample k is of class k mod `classes`
    classes   how many there are; None: as many as the network has rows for
    frames    a list: gets uint8 grids of the first batch on its way from noise to image, about 50
    tick      called after each step of each batch
    """
    import numpy as np

    from nanodiff import samplers
    from nanodiff.images import grid

    for name, value in (("count", count), ("batch", batch)):
        if not isinstance(value, int) or value < 1:
            raise _error(f"{name} = {value!r}: must be an integer of at least 1")

    def watch(i, n, t, x, x0):
        if tick:
            tick()
        if frames is not None and not images and (i % math.ceil(n / 50) == 0 or i == n - 1):
            frames.append(grid(x, scale=zoom(shape)))

    classes = classes or getattr(getattr(model, "config", None), "num_class_embeds", None)
    if label is not None and not (classes and 0 <= label < classes):
        limit = f"from 0 to {classes - 1}" if classes else "left out: the network was trained without classes"
        raise _error(f"label = {label}: must be {limit}")
    images, draw = [], getattr(samplers, f"{sampler}_sample")
    for first in range(0, count, batch):
        B = min(batch, count - first)
        if classes:
            options["labels"] = np.arange(first, first + B) % classes if label is None else np.full(B, label)
        images.append(draw(model, diff, (B, *shape), first=first, callback=watch, **options))
    return np.concatenate(images)


def zoom(shape):
    """How much to enlarge images of (H, W, C) in a grid, so that they can be seen."""
    return max(1, 64 // max(shape[:2]))


@contextlib.contextmanager
def _stop_asked():
    """A list that the first Ctrl-C or SIGTERM makes non-empty; the second acts as it always does."""
    asked, before = [], {}

    def note(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    with contextlib.suppress(ValueError):  # signals are the main thread's
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(settings=None):
    """Train, or go on training, as `settings` (TrainSettings) say; returns the run folder.

    RUN/run.json, checkpoints/   see checkpoint.py
    RUN/stats.jsonl              a line per `log_every` steps: step, loss (their mean), lr, grad_norm,
                                 images_per_s, seconds, skipped (steps whose loss or gradient was not finite)
    RUN/samples/000500.png       the same noise denoised every time: raw weights left, averaged ones right
    RUN/samples.png, steps.gif, loss.png   at the end

    The same settings again resume, with the same bits as if there had been no break. More `steps` extend a
    run with decay="constant"; with "cosine" the learning rate of every step depends on them. The first Ctrl-C
    or SIGTERM lets the step end, writes a checkpoint and returns. A NanodiffError comes before anything on
    disk is touched: for settings that contradict the run in `out`, for a folder that holds something else,
    for one that is being trained.
    """
    import numpy as np
    from tqdm import tqdm

    from nanodiff import __version__, checkpoint, context, data, graph, images, optim
    from nanodiff.diffusion import Diffusion
    from nanodiff.unet import UNet

    # Everything is made, and so checked, before the run folder is touched
    s = settings or TrainSettings()
    s = s.for_data(s.data) if s.data in PRESETS else s
    if s.threads:
        context.set_threads(s.threads)
    source = data.load_data(s.data, size=s.size)
    s = s.for_data(source.name)
    N, *shape = source.images.shape
    if s.labels and source.labels is None:
        if settings.labels:
            raise _error(f"labels = True: {s.data} has no labels to tell the network; use --no-labels")
        s = replace(s, labels=False)
    if s.label_drop and not s.labels:
        raise _error(f"label_drop = {s.label_drop}: must be 0 without --labels, and for data that has none")
    told = int(source.labels.max()) + 1 if s.labels else 0
    rows = told + (s.label_drop > 0)  # one more for "none"
    model = UNet(unet_config(s, *shape, rows), device=s.device, seed=s.seed, dtype=s.dtype)
    opt = optim.Adam(model.params, lr=s.lr, clip=s.clip or None, ema=s.ema or None)
    diff = Diffusion(s.timesteps, s.schedule, s.prediction, zero_snr=s.zero_snr, variance=s.variance)
    options = dict(min_snr=s.min_snr, offset_noise=s.offset_noise, label_drop=s.label_drop)
    views = [contextlib.nullcontext, opt.with_ema][: 2 if s.ema else 1]  # raw weights, averaged ones
    folder = Path(s.out or Path("runs") / source.name)
    described = dict(name=source.name, images=N, sha256=hashlib.sha256(source.images).hexdigest())
    run = dict(
        version=__version__, settings=asdict(s), data=described, shape=shape, classes=source.classes,
        model=model.config.to_dict(), diffusion=diff.to_dict(), finished=None,
    )  # fmt: skip
    free = FREE if s.decay == "cosine" else FREE | {"steps"}
    run = checkpoint.match_run(folder, run, free, {f.name: f.default for f in fields(TrainSettings)})

    step, window, seconds, row = 0, [], 0.0, 0  # losses since the last line of stats; steps skipped in a row
    with checkpoint.claim(folder):
        saved = checkpoint.load_checkpoint(folder, aside=True)
        if saved:
            checkpoint.restore(saved, model, opt)
            step, window, seconds = saved.step, saved.meta.get("window", []), saved.meta.get("seconds", 0.0)
        if step > s.steps or step == run["finished"] == s.steps:
            more = "; a larger --steps extends it" if s.decay == "constant" else ""
            print(f"{folder} is finished: it has {step} steps{more}")
            return folder
        checkpoint.write_file(folder / "run.json", json.dumps(run, indent=2) + "\n")
        records = checkpoint.read_stats(folder, step)
        checkpoint.write_file(folder / "stats.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        (folder / "samples").mkdir(exist_ok=True)
        place = "x".join(map(str, shape)) + f"; {model.params.count:,} weights; {s.device}; in {folder}"
        print(f"{source.name}: {N} images {place}{f', from step {step}' if step else ''}", flush=True)

        def save():
            os.fsync(stats.fileno())
            spent = time.perf_counter() - begun
            checkpoint.save_checkpoint(folder, step, model, opt, window=window, seconds=spent)

        resident = None  # on the GPU: the data set, and the step as a graph, whose results come steps later
        if model.ctx.device == "gpu" and not s.offset_noise and s.variance != "learned_range":
            told_of = source.labels if s.labels else None
            more = dict(min_snr=s.min_snr, label_drop=s.label_drop)
            resident = graph.Training(
                model, opt, diff, source.images, told_of, s.batch, s.seed, s.flip, **more
            )
        begun, said, busy, fresh = time.perf_counter() - seconds, time.perf_counter(), 0.0, 0
        skipped, kept, settled = float(model.ctx.to_host(opt.state)[3]), step, True
        with (
            _stop_asked() as asked,
            open(folder / "stats.jsonl", "a") as stats,
            tqdm(total=s.steps, initial=step, unit="step", disable=None) as bar,  # none without a terminal
        ):
            while step < s.steps and not (asked and settled):
                start = time.perf_counter()
                lr = optim.learning_rate(step, s.steps, s.lr, s.warmup, s.decay)
                if resident:
                    now = (step + 1) % s.log_every, (step + 1) % s.save_every, (step + 1) % s.sample_every
                    settled = bool(asked) or step + 1 == s.steps or 0 in now  # all results must be here
                    done = resident.step(step, lr, wait=settled)
                else:
                    chosen = data.batch_indices(N, s.batch, step, s.seed)
                    x0, labels = source.images[chosen], source.labels[chosen] if s.labels else None
                    x0 = data.to_float(data.flip(x0, s.seed, step) if s.flip else x0)
                    loss = train_step(model, opt, diff, x0, labels, key=(s.seed, step), lr=lr, **options)
                    _, norm2, _, count = map(float, model.ctx.to_host(opt.state))
                    done = [(step, loss, norm2, count)]
                step += 1
                bar.update()
                busy, fresh = busy + time.perf_counter() - start, fresh + 1

                for at, loss, norm2, count in done:  # noqa: B007 (the last ones are used below)
                    window.append(loss)
                    row, skipped = row + 1 if count > skipped else 0, count
                    if row == PATIENCE:
                        which = f"steps {at - row + 2} to {at + 1} had no finite loss or gradient"
                        remedy = "train into another --out with a smaller --lr or --clip"
                        raise _error(f"{which} (loss {loss}, lr {lr:g}) and changed no weight: {remedy}")
                if step % s.log_every == 0:
                    finite = [x for x in window if math.isfinite(x)] or [None]
                    mean = finite[0] and sum(finite) / len(finite)
                    norm = math.sqrt(norm2) if math.isfinite(norm2) else None
                    rate, spent = s.batch * fresh / busy, time.perf_counter() - begun
                    records.append(dict(
                        step=step, loss=mean, lr=lr, grad_norm=norm, images_per_s=round(rate, 1),
                        seconds=round(spent, 2), skipped=int(skipped),
                    ))  # fmt: skip
                    stats.write(json.dumps(records[-1]) + "\n")
                    stats.flush()
                    line = {"loss": f"{mean or math.nan:.4f}", "images/s": f"{rate:.0f}"}
                    bar.set_postfix(line)
                    if bar.disable and time.perf_counter() > said + 10:
                        said, left = time.perf_counter(), (s.steps - step) * busy / fresh
                        words = "  ".join(f"{key} {value}" for key, value in line.items())
                        print(f"step {step} of {s.steps}  {words}  {left / 60:.1f} min left", flush=True)
                    window, busy, fresh = [], 0.0, 0
                if step % s.save_every == 0:
                    save()
                    kept = step
                if step % s.sample_every == 0 and not asked:
                    grids, steps = [], min(PREVIEW_STEPS, s.timesteps)
                    for weights in views:
                        with weights():
                            x = sample_images(
                                model, diff, shape, min(PREVIEWS, s.samples), classes=told,
                                steps=steps, seed=s.seed,
                            )  # fmt: skip
                        grids.append(images.grid(x, scale=zoom(shape)))
                    images.save_png(folder / "samples" / f"{step:06d}.png", np.concatenate(grids, axis=1))
            if kept < step:
                save()
        if step < s.steps:
            print(f"stopped at step {step} of {s.steps}; the same command goes on from there")
            return folder

        frames, steps = [], min(FINAL_STEPS, s.timesteps)
        with views[-1]():
            x = sample_images(
                model, diff, shape, s.samples, frames=frames, classes=told, steps=steps, seed=s.seed
            )
        images.save_png(folder / "samples.png", images.grid(x, scale=zoom(shape)))
        images.save_gif(folder / "steps.gif", frames)
        drawn = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
        if drawn:
            images.loss_curve(folder / "loss.png", *zip(*drawn))
        run["finished"] = step
        checkpoint.write_file(folder / "run.json", json.dumps(run, indent=2) + "\n")
        spent = (time.perf_counter() - begun) / 60
        print(f"finished: {step} steps in {spent:.1f} min; see {folder / 'samples.png'}")
    return folder
