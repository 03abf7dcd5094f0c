"""How the cost of a training step grows: with the batch, the image, the width of the network, the threads.

    python bench/scaling.py                                  # all four sweeps, against PyTorch channels_last
    python bench/scaling.py --sweep batch width --plot scaling.png
    python bench/scaling.py --sweep image --without-torch --limit 200

A step is that of train_step.py: forward, mean squared error, backward, Adam; float32, random data. Each side
of a sweep is a process of its own (one for each number of threads) that sleeps while the other has its turn;
sides take turns A B A B; the median over all steps of all turns counts. A point that would take longer than
`--limit` seconds, by what the point before it took, is left out with those after it. In the table, ~ x^p says
how the milliseconds grew from the point before. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys

import train_step
from train_step import BATCH, NETWORKS

SIDES = ("nanodiff", "torch channels_last")
WARMUP = 2  # steps at a point that are not counted


def sweeps(threads):
    """name: (title, points), a point being (x, cost by rule of thumb, config, batch, threads)."""
    small, mid64, usual = NETWORKS["small"], NETWORKS["mid64"], BATCH["small"]

    def wide(factor):
        return small | {"block_out_channels": [int(C * factor) for C in small["block_out_channels"]]}

    counts = [2**i for i in range(8) if 2**i < threads] + [threads]
    return {
        "batch": ("small, batch", [(B, B, small, B, threads) for B in (1, 2, 4, 8, 16, 32, 64)]),
        "image": (
            "mid64 with a batch of 4, image side",
            [(n, n**2, mid64 | {"sample_size": n}, 4, threads) for n in (16, 32, 64, 128)],
        ),
        "width": (
            f"small with a batch of {usual}, channels times",
            [(f, f**2, wide(f), usual, threads) for f in (0.5, 1, 2)],
        ),
        "threads": (f"small with a batch of {usual}, threads", [(n, 1 / n, small, usual, n) for n in counts]),
    }


# ---- a side: a process that takes steps on demand, a line of JSON for each demand and each answer ----
def start(side, threads):
    command = [sys.executable, __file__, "--side", side, "--threads", str(threads)]
    environment, pipe = train_step.environment(threads), subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def ask(process, config, batch, steps):
    """Milliseconds of `steps` steps."""
    print(json.dumps([config, batch, steps]), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f"the process for {process.args[3]} failed with exit code {process.wait()}")
    return json.loads(answer)


def serve(side, threads):
    """What the process does, until there are no more lines."""
    point = step = None
    for line in sys.stdin:
        *wanted, steps = json.loads(line)
        warmup = WARMUP if wanted != point else 0
        if warmup:
            point, step = wanted, None  # the network of the last point makes room
            if side == "nanodiff":
                step = train_step.nanodiff_side(*point)[0]["step"]
            else:
                step = train_step.torch_side(*point, channels_last=True, compiled=False, threads=threads)[0][
                    "step"
                ]
        print(json.dumps(train_step.timed(step, warmup, steps)), flush=True)


def measure(points, sides, args):
    """Rows {x, images_per_s, ms: {side: ..}} of the points within the limit, and the x of those left out."""
    rows, last = [], None  # last: seconds and cost of the point before
    with contextlib.ExitStack() as stack:  # at its end the sides see no more lines, and stop
        processes = {}
        for i, (x, cost, config, batch, threads) in enumerate(points):
            if last and last[0] * cost / last[1] > args.limit:
                return rows, [point[0] for point in points[i:]]
            times = {side: [] for side in sides}
            for side in sides:
                if (side, threads) not in processes:
                    processes[side, threads] = stack.enter_context(start(side, threads))
            for _ in range(args.turns):
                for side in sides:
                    times[side] += ask(processes[side, threads], config, batch, args.steps)
            steps = WARMUP + args.turns * args.steps
            last = 1e-3 * steps * sum(min(values) for values in times.values()), cost
            ms = {side: statistics.median(values) for side, values in times.items()}
            rows.append({"x": x, "images_per_s": 1e3 * batch / ms["nanodiff"], "ms": ms})
            print(f"{x}: {', '.join(f'{s} {v:.1f} ms' for s, v in ms.items())}", file=sys.stderr)
    return rows, []


def print_table(title, rows, left_out, limit):
    print(f"\n{title}")
    sides = list(rows[0]["ms"])
    print(
        f"  {'x':>5} {'images/s':>9}"
        + "".join(f" {side + ' ms':>22} {'~ x^p':>6}" for side in sides)
        + (f" {'ratio':>7}" if len(sides) > 1 else "")
    )
    for before, row in zip([None, *rows], rows):
        cells = ""
        for side, ms in row["ms"].items():
            p = before and math.log(ms / before["ms"][side]) / math.log(row["x"] / before["x"])
            cells += f" {ms:22.1f} " + (f"{p:6.2f}" if before else f"{'':6}")
        if len(sides) > 1:
            row["ratio"] = row["ms"][sides[1]] / row["ms"][sides[0]]
            cells += f" {row['ratio']:6.2f}x"
        print(f"  {row['x']:>5} {row['images_per_s']:9.1f}{cells}")
    if left_out:
        print(f"  left out, more than {limit:g} s by what came before: {', '.join(map(str, left_out))}")


def plot(path, results):
    """Small multiples, one for each sweep, all logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    size, plain = (1 + 3.4 * len(results), 4), FuncFormatter(lambda value, _: f"{value:g}")
    fig, axes = plt.subplots(1, len(results), figsize=size, sharey=True, squeeze=False)
    for ax, result in zip(axes[0], results):
        x, (title, _, label) = [row["x"] for row in result["points"]], result["title"].rpartition(", ")
        for side, style in zip(SIDES[: len(result["points"][0]["ms"])], ("o-", "s--")):
            ax.plot(x, [row["ms"][side] for row in result["points"]], style, label=side)
        ax.set(xscale="log", yscale="log", xlabel=label)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(x)
        ax.set_xticks([], minor=True)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(NullFormatter())
        ax.grid(which="both", color="0.9")
    axes[0, 0].set_ylabel("milliseconds of a training step")
    axes[0, 0].legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(sweeps(1))
    parser.add_argument("--sweep", nargs="+", choices=names, default=names)
    parser.add_argument("--points", type=int, help="only the first so many of each sweep")
    parser.add_argument("--turns", type=int, default=3, help="of each side at each point (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a turn (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="at most, and outside the sweep over them")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a point may take (default 60)")
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--plot", metavar="FILE", help="draw the tables")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return serve(args.side, args.threads)
    without = args.without_torch or importlib.util.find_spec("torch") is None
    if without and not args.without_torch:
        print("PyTorch is not installed: nanodiff alone", file=sys.stderr)

    result = {"cpu": train_step.cpu_name(), "threads": args.threads, "load": round(os.getloadavg()[0], 2)}
    packages = ("numpy", "numba") if without else ("numpy", "numba", "torch")
    result |= {"versions": {name: importlib.metadata.version(name) for name in packages}, "sweeps": []}
    print(f"{result['cpu']}, {args.threads} threads; turns: {args.turns}, steps in each: {args.steps}")
    for name in args.sweep:
        title, points = sweeps(args.threads)[name]
        rows, left_out = measure(points[: args.points], SIDES[: 1 if without else 2], args)
        print_table(title, rows, left_out, args.limit)
        result["sweeps"].append({"sweep": name, "title": title, "points": rows, "left_out": left_out})
    if args.plot:
        plot(args.plot, result["sweeps"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
