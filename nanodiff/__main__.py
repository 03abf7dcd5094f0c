"""The command line: train, sample, eval, info. Nothing heavy is imported before a command runs."""

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path

from nanodiff.train import PRESETS, TrainSettings

TRAIN = """Train on images; without arguments on drawn glyphs, in minutes. The same command again resumes a
run that was stopped or killed, with the same bits as if it had not been. With --decay constant a larger
--steps extends a run."""
SAMPLE = """Draw images with the network in a run folder, or in a folder in diffusers' layout. Image k depends
on --seed and k alone."""

EVAL = """Bits per dimension: an upper bound on the bits that a network needs for each value of an image."""


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"nanodiff: {message} ({self.prog} --help lists what there is)\n")


def parser():
    top = Parser(prog="nanodiff", description="Image diffusion without a deep-learning framework.")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | sample | eval | info")

    def command(name, function, description):
        p = commands.add_parser(name, description=description, help=description.split(";")[0].split(". ")[0])
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        p.set_defaults(function=function)
        return p

    def model_flags(p):
        p.add_argument("--raw", action="store_true", help="the last weights instead of their average (EMA)")
        p.add_argument(
            "--device", default="cpu", choices=("cpu", "gpu", "cuda", "ref"), help="(default: %(default)s)"
        )
        p.add_argument("--threads", type=int, help="CPU threads (default: all)")

    p = command("train", train, TRAIN)
    for f in dataclasses.fields(TrainSettings):
        rule, flag, text = f.metadata, f"--{f.name.replace('_', '-')}", f.metadata["help"]
        if f.default is None and f.name in PRESETS["other"]:
            chosen = [
                f"{name}: {preset.get(f.name, PRESETS['other'][f.name])}" for name, preset in PRESETS.items()
            ]
            text += f" (default: by the data; {'; '.join(chosen).replace(', ', ',')})"
        elif f.default is not None:
            text += " (default: %(default)s)"
        if rule["kind"] is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            kind = str if rule["kind"] is tuple else rule["kind"]
            p.add_argument(
                flag, type=kind, default=f.default, choices=rule["choices"], help=text, metavar=_metavar(f)
            )

    p = command("sample", sample, SAMPLE)
    p.add_argument("folder", metavar="RUN|FOLDER", help="a run folder, or one in diffusers' layout")
    p.add_argument("--sampler", choices=("ddim", "ddpm", "dpm"), default="ddim",
                   help="dpm: DPM-Solver++(2M) (default: %(default)s)")  # fmt: skip
    p.add_argument("--steps", type=int, help="steps (default: 50 for ddim, 20 for dpm, all for ddpm)")
    p.add_argument("--spacing", help="of the steps: trailing, linspace, leading, quadratic")
    p.add_argument("--eta", type=float, help="ddim: noise put back at each step, 0 to 1 (default: 0)")
    p.add_argument("--eta-stop", type=int, metavar="T", help="ddim: the time from which on eta is 0")
    p.add_argument("--noise-stop", type=int, metavar="T",
                   help="ddim: the time from which on noise is left out but room for it is not")  # fmt: skip
    p.add_argument("--guidance", type=float, metavar="G",
                   help="pull towards the class, where trained with --label-drop; 1: none")  # fmt: skip
    p.add_argument("--clip", action=argparse.BooleanOptionalAction, default=None,
                   help="hold predicted images in range (default: yes)")  # fmt: skip
    p.add_argument("--dynamic", type=float, metavar="Q", help="dynamic thresholding at this quantile")
    p.add_argument("--count", type=int, default=64, help="images (default: %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    p.add_argument("--label", type=int, help="class of all images, by number (default: all classes in turn)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    p.add_argument("--out", default="grid.png", help="a PNG with all images (default: %(default)s)")
    p.add_argument("--gif", help="also a GIF of the first batch, from noise to images")
    model_flags(p)

    p = command("eval", evaluate, EVAL)
    p.add_argument("folder", metavar="RUN|FOLDER", help="a run folder, or one in diffusers' layout")
    p.add_argument("--data", help="as for train (default: what the run was trained on)")
    p.add_argument("--count", type=int, default=64, help="images, evenly chosen (default: %(default)s)")
    p.add_argument(
        "--times", type=int, default=50, help="noise levels per image; 0: all (default: %(default)s)"
    )
    p.add_argument("--batch", type=int, default=16, help="images at a time (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    model_flags(p)

    p = command("info", info, "Say what a run folder, or a folder in diffusers' layout, holds.")
    p.add_argument("folder", metavar="RUN|FOLDER", help="a run folder, or one in diffusers' layout")
    return top


def _metavar(f):
    names = {"data": "DATA", "out": "RUN", "size": "HxW", "channels": "C,C,..."}
    return None if f.metadata["choices"] else names.get(f.name, "X" if f.metadata["kind"] is float else "N")


def train(args):
    from nanodiff.train import train

    train(TrainSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainSettings)}))


def sample(args):
    from tqdm import tqdm

    from nanodiff.checkpoint import load_run
    from nanodiff.context import NanodiffError, set_threads
    from nanodiff.images import grid, save_gif, save_png
    from nanodiff.train import sample_images, zoom

    for name in ("eta", "eta_stop", "noise_stop"):
        if getattr(args, name) is not None and args.sampler != "ddim":
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise NanodiffError(f"{flag} is for --sampler ddim: leave it out, or choose that sampler")
    for path in filter(None, (args.out, args.gif)):
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {path} does not exist: make it, or write somewhere else")
    if args.threads:
        set_threads(args.threads)
    run = load_run(args.folder, args.device, ema=not args.raw)
    steps = args.steps if args.steps is not None else run.diffusion.timesteps
    if args.sampler != "ddpm" and args.steps is None:
        steps = min(50 if args.sampler == "ddim" else 20, steps)
    options = dict(run.sampling, steps=steps, seed=args.seed)
    for name in ("eta", "eta_stop", "noise_stop", "guidance", "clip", "dynamic", "spacing"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    frames = [] if args.gif else None
    with tqdm(total=steps * -(-args.count // max(1, args.batch)), unit="step", disable=None) as bar:
        images = sample_images(
            run.model,
            run.diffusion,
            run.shape,
            args.count,
            args.sampler,
            args.batch,
            frames,
            bar.update,
            args.label,
            classes(run),
            **options,
        )
    save_png(args.out, grid(images, scale=zoom(run.shape)))
    if args.gif:
        save_gif(args.gif, frames)
    print(f"{args.count} images of {args.folder} by {args.sampler}, {steps} steps: {args.out}")


def classes(run):
    """How many classes a run's network can be asked for; None: as many as it has rows for."""
    return run.model.config.num_class_embeds - 1 if run.settings.get("label_drop") else None


def evaluate(args):
    import numpy as np
    from tqdm import tqdm

    from nanodiff.checkpoint import load_run
    from nanodiff.context import NanodiffError, set_threads
    from nanodiff.data import load_data, to_float
    from nanodiff.metrics import bits_per_dim

    if args.threads:
        set_threads(args.threads)
    run = load_run(args.folder, args.device, ema=not args.raw)
    name = args.data or run.settings.get("data")
    if name is None:
        raise NanodiffError(f"{args.folder} does not say what it was trained on: give --data")
    data = load_data(name, size=run.shape[:2])
    if data.images.shape[3] != run.shape[2]:
        raise NanodiffError(f"--data {name} has {data.images.shape[3]} channels: must be {run.shape[2]}")
    chosen = np.linspace(0, len(data.images) - 1, min(args.count, len(data.images))).astype(int)
    told = run.model.config.num_class_embeds
    if told and data.labels is None:
        raise NanodiffError(f"--data {name} has no labels, and the network needs them")
    labels, times = data.labels[chosen] if told else None, args.times or None
    batches = -(-len(chosen) // max(1, args.batch))
    with tqdm(total=((times or run.diffusion.timesteps - 1) + 1) * batches, unit="step", disable=None) as bar:
        found = bits_per_dim(
            run.model, run.diffusion, to_float(data.images[chosen]), times, args.seed, labels, args.batch,
            tick=bar.update,
        )  # fmt: skip
    print(
        f"{found['total']:.4f} +- {found['error']:.4f} bits per dimension "
        f"({len(chosen)} images of {name}, {times or 'all'} noise levels, {run.diffusion.variance})\n"
        f"{found['last']:.4f} in the last step, {found['prior']:.2e} in the first, the rest between"
    )


def info(args):
    from nanodiff.checkpoint import load_run, read_stats

    run = load_run(args.folder, "ref")
    stats = read_stats(run.folder, run.step)
    shape, diffusion = "x".join(map(str, run.shape)), run.diffusion.to_dict()
    rows = {"folder": run.folder, "images": shape, "parameters": f"{run.model.params.count:,}"}
    if run.step is not None:
        rows["step"] = f"{run.step} of {run.settings.get('steps')}"
    if stats:
        last = stats[-1]
        rows["loss"] = f"{last.get('loss')} (mean up to step {last['step']})"
        rows["trained"] = f"{last.get('seconds')} s; steps skipped: {last.get('skipped')}"
    rows["diffusion"] = ", ".join(f"{key} {value}" for key, value in diffusion.items())
    print("\n".join(f"{key:12}{value}" for key, value in rows.items()))
    for title, table in (("network", run.model.config.to_dict()), ("settings", run.settings)):
        if table:
            print(f"\n{title}\n" + "\n".join(f"  {key:24}{value}" for key, value in table.items()))
    print("\nfiles")
    for path in sorted(run.folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            print(f"  {str(path.relative_to(run.folder)):44}{path.stat().st_size / 1e6:10.3f} MB")


def main(argv=None):
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_: print(f"nanodiff: warning: {text}", file=sys.stderr)
            args.function(args)
    except KeyboardInterrupt:
        print("nanodiff: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        from nanodiff.context import NanodiffError

        if args.debug or not isinstance(error, (NanodiffError, OSError)):
            raise
        print(f"nanodiff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
