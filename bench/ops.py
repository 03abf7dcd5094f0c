"""Every op against PyTorch and against the machine, at the shapes of a training step.

    python bench/ops.py                                           # the three networks of train_step.py
    python bench/ops.py --network cifar10 --op conv attention     # ops with one of these words in their name
    python bench/ops.py --plot roofline.png --json ops.json

One training step of each network is watched: which op it calls, at which dimensions, how often. Each of these
is then timed on random data, nanodiff and PyTorch in turns in this process; medians. Each side has weights in
the layout it likes best. Ops that no step calls are timed at the dimensions that testing.CASES has for them.

The columns: calls in a step; milliseconds of one; GFLOP/s, of the multiplications and additions that the
definition has; GB/s, of every argument and result once; roof, the share of what the machine can do: the time
that these operations take at its measured peak, or the bytes at that of its memory, whichever is longer, over
the time taken. It passes 100 % where an op does with fewer multiplications (Winograd), on a matrix unit, or
in the caches. Then PyTorch's milliseconds, ratio = PyTorch's / nanodiff's, calls x ms, and its share of the
sum. Below the rows: the same of all calls of each op together. Where another program used the cores, a row is
measured again; marked ! if that did not help. The last line of stdout is one JSON object.

The sums are not the time of a step, which is measured too (PyTorch: channels_last). An op that runs again and
again finds its arguments in the caches and its results' memory in use already.
"""

import argparse
import collections
import importlib
import inspect
import json
import math
import os
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import train_step
from train_step import BATCH, NETWORKS, ROOT, timed

sys.path.insert(0, str(ROOT))
from nanodiff import kernels  # noqa: E402
from nanodiff.testing import CASES, WRITTEN, prepare, traffic  # noqa: E402

ROUNDS = 5  # turns of each side, for an op that is not slow
REST = 0.01  # seconds after PyTorch's turn: that long its idle threads keep a core busy
FAMILY = {
    op: family
    for family in kernels.FAMILIES
    for op in importlib.import_module(f"nanodiff.kernels.{family}_ref").__all__
}


# ---- what a training step calls ----
def _image(x):
    return dict(zip("BHWC", x.shape))


def _has(a, name):
    return getattr(a, name, None) is not None


# dimensions, as CASES names them, of the arguments of a call: by op, or its name without the last word
DIMENSIONS = {
    "linear": lambda a: dict(
        shape=a.x.shape[:-1], C=a.x.shape[-1], O=a.weight.shape[-1], residual=int(_has(a, "residual")),
        stack=len(a.weight) if a.weight.ndim == 3 else 0,
    ),
    "upconv_prepare": lambda a: dict(zip("BHWCO", (1, a.H, a.W, *a.weight.shape[2:]))),
    "upconv": lambda a: _image(a.x) | dict(O=a.weight.shape[3]),
    "conv_prepare": lambda a: dict(
        B=1, H=a.H, W=a.W, C=a.weight.shape[2], O=a.weight.shape[3], K=a.weight.shape[0],
        stride=a.stride, pad=tuple(a.pad), plus="",
    ),
    "conv": lambda a: _image(a.x) | dict(
        O=a.weight.shape[3], K=a.weight.shape[0], stride=a.stride, pad=tuple(a.pad),
        plus="e" * _has(a, "emb") + "r" * _has(a, "residual"),
    ),
    "groupnorm": lambda a: _image(a.x) | dict(
        G=a.groups, offset=0, silu=int(a.silu), residual=int(_has(a, "residual"))
    ),
    "attention": lambda a: dict(zip("BNC", a.q.shape)) | dict(heads=a.heads, scale=1),
    "activation": lambda a: dict(shape=a.x.shape, kind=a.kind),
    "modulate": lambda a: _image(a.x) | dict(kind=a.kind),
    "upsample_backward": lambda a: dict(shape=tuple(n // s for n, s in zip(a.dout.shape, (1, 2, 2, 1)))),
    "concat": lambda a: _image(a.a) | dict(D=a.b.shape[3]),
    "split": lambda a: _image(a.x) | dict(C=a.C, D=a.x.shape[3] - a.C),
    "time_embedding": lambda a: dict(
        B=len(a.t), dim=a.dim, flip=int(a.flip_sin_to_cos), shift=a.freq_shift
    ),
    "adam_update": lambda a: dict(
        n=a.weights.size, taken=5, clip=a.clip, ema=a.ema_decay if a.ema.size else 0
    ),
}  # fmt: skip


def dimensions(op, a):
    """A dict of dimensions for CASES[op] from the arguments of a call, by name."""
    rule = DIMENSIONS.get(op) or DIMENSIONS.get(op.rpartition("_")[0])
    if rule:
        return rule(a)
    if CASES[op].bench.keys() != {"shape"}:
        print(f"{op}: DIMENSIONS has no rule for it, so it is timed at the shape of CASES", file=sys.stderr)
        return CASES[op].bench
    return dict(shape=next(v for v in vars(a).values() if isinstance(v, np.ndarray)).shape)


def watched(step):
    """Calls of every op during step(): a Counter of (op, dimensions as a tuple of pairs)."""
    k, calls, plain = kernels.load("cpu"), collections.Counter(), {}

    def watch(op, function):
        signature = inspect.signature(function)

        def call(*args, **options):
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            a = SimpleNamespace(**bound.arguments)
            if op.endswith("conv_forward"):  # it is handed prepared weights; CASES starts from plain ones
                a.weight = plain.get(id(a.weight), a.weight)
            calls[op, tuple(dimensions(op, a).items())] += 1
            out = function(*args, **options)
            if op.endswith("conv_prepare"):
                plain[id(out)] = a.weight
            return out

        return call

    functions = {op: getattr(k, op) for op in CASES}
    try:
        vars(k).update({op: watch(op, function) for op, function in functions.items()})
        step()
    finally:
        vars(k).update(functions)
    return calls


# ---- what the machine can do ----
def peaks(threads):
    """What all threads can do: .gflops of float32 multiply-adds in registers, .gbs of a = b + s c in memory;
    .free(), whether they have their cores to themselves at the moment."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from nanodiff.kernels.parallel_cpu import VECTOR, parallel

    jobs, rounds, chains = 8 * threads, 100_000, 12  # so many independent multiply-adds hide their latency
    vector = ir.VectorType(ir.FloatType(), VECTOR)

    @intrinsic
    def multiply_add(typingctx, n):
        """n rounds of y = y x + x in each chain; a value that depends on all of it."""

        def codegen(context, b, signature, args):
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{VECTOR}f32")
            x = ir.Constant(vector, [0.5] * VECTOR)
            slots = [cgutils.alloca_once_value(b, x) for _ in range(chains)]  # LLVM makes them registers
            with cgutils.for_range(b, args[0]):
                for slot in slots:
                    b.store(b.call(fma, [b.load(slot), x, x]), slot)
            total = b.load(slots[0])
            for slot in slots[1:]:
                total = b.fadd(total, b.load(slot))
            return b.extract_element(total, ir.Constant(ir.IntType(32), 0))

        return types.float32(types.intp), codegen

    @parallel
    def compute(job, worker, rounds, out):
        out[job] = multiply_add(rounds)

    @parallel(flags={"contract"})
    def triad(job, worker, a, b, c):
        n = a.size // jobs
        a, b, c = a[job * n :][:n], b[job * n :][:n], c[job * n :][:n]
        for i in range(n):
            a[i] = b[i] + np.float32(3) * c[i]

    out, (a, b, c) = np.zeros(jobs, np.float32), np.ones((3, 1 << 26), np.float32)  # 3 x 256 MB
    flops, count = 2 * jobs * rounds * chains * VECTOR, a.size // jobs * jobs
    least = min(timed(lambda: compute(jobs, rounds, out), 10, 100))  # a millisecond or so
    gbs = 1e-6 * 12 * count / min(timed(lambda: triad(jobs, a, b, c), 2, 5))

    def free():
        return statistics.mean(timed(lambda: compute(jobs, rounds, out), 1, 8)) < 1.15 * least

    return SimpleNamespace(gflops=1e-6 * flops / least, gbs=gbs, free=free)


# ---- one op ----
def as_tensor(torch, name, a):
    """A copy as a tensor; weights (K,K,C,O) and (C,O) as views of the layouts that PyTorch keeps them in."""
    if not isinstance(a, np.ndarray):
        return a
    tensor = torch.from_numpy(a).clone()
    if name in ("weight", "dweight") and a.ndim == 4:
        own = tensor.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        return own.permute(2, 3, 1, 0)
    return tensor.T.contiguous().T if name in ("weight", "dweight") and a.ndim == 2 else tensor


def opponent(torch, op, names, arguments):
    """A call that does the same in PyTorch; None without PyTorch, or if it only hands an argument back."""
    if torch is None or CASES[op].torch is None:
        return None
    tensors = {name: as_tensor(torch, name, a) for name, a in zip(names, arguments)}
    call = CASES[op].pytorch(op, *tensors.values())
    made = call()
    return None if any(made is a for name, a in tensors.items() if name not in WRITTEN) else call


def aligned(a):
    """A copy in memory of nanodiff's own, as an op gets it in training."""
    from nanodiff.kernels.parallel_cpu import empty

    if not isinstance(a, np.ndarray):
        return a
    out = empty(a.shape, a.dtype)
    out[...] = a
    return out


def measure(op, dims, torch, machine, seconds):
    """A row of the table: a dict. Measured again if another program used the cores, three times at most."""
    case, k = CASES[op], kernels.load("cpu")
    function, arguments = getattr(k, op), case.arguments(dims)
    names = list(inspect.signature(function).parameters)
    theirs = opponent(torch, op, names, arguments)
    args = [aligned(a) for a in arguments]
    prepare(k, op, args)
    made = function(*args)
    results = list(made) if isinstance(made, tuple) else [made]
    results += [a for name, a in zip(names, args) if name in WRITTEN]
    flops, moved = case.cost(dims), traffic(arguments, results)
    del made, results  # their memory is used again

    sides = {"ms": lambda: function(*args)} | ({"torch_ms": theirs} if theirs else {})
    first = {side: timed(call, 1, 1)[0] for side, call in sides.items()}
    rounds = min(ROUNDS, max(3, math.ceil(1e3 * seconds / sum(first.values()))))
    for _ in range(3):
        times, free = {side: [] for side in sides}, machine.free()
        for _ in range(rounds):
            for side, call in sides.items():
                if theirs and side == "ms":
                    time.sleep(REST)
                count = 1e3 * seconds / len(sides) / rounds / first[side]
                times[side] += timed(call, 1, min(1000, max(1, round(count))))
        time.sleep(REST)
        if free and machine.free():
            break
    else:
        free = False
    row = dict(op=op, dims=dims, shape=describe(dims), equal=case.equal, free=free, flops=flops, bytes=moved)
    row |= {"torch_ms": None} | {side: statistics.median(values) for side, values in times.items()}
    return rates(row | dict(roof_ms=1e-6 * max(flops / machine.gflops, moved / machine.gbs)))


def whole_step(step, torch_side):
    """Milliseconds of step() and of PyTorch's, from the arguments of train_step.torch_side or None."""
    sides = {"step_ms": step}
    if torch_side:
        sides["torch_step_ms"] = train_step.torch_side(*torch_side)[0]["step"]
    times = {side: [] for side in sides}
    for _ in range(2):
        for side, call in sides.items():
            time.sleep(REST)
            times[side] += timed(call, 1, 2)
    return {side: statistics.median(values) for side, values in times.items()}


# ---- printing ----
def rates(row):
    """The row with what follows from its times, operations and bytes."""
    ms, theirs = row["ms"], row["torch_ms"]
    more = dict(gflops=1e-6 * row["flops"] / ms, gbs=1e-6 * row["bytes"] / ms, roof=row["roof_ms"] / ms)
    return row | more | dict(ratio=None if theirs is None else theirs / ms)


def together(name, rows):
    """One row for all calls of several."""
    sums = {key: sum(r["calls"] * r[key] for r in rows) for key in ("ms", "roof_ms", "flops", "bytes")}
    row = dict(op=name, shape=f"{len(rows)} shape{'s' * (len(rows) > 1)}")
    row["calls"] = sum(r["calls"] for r in rows)
    row["torch_ms"] = sum(r["calls"] * (r["torch_ms"] or 0) for r in rows) or None
    return rates(row | sums | {key: all(r[key] for r in rows) for key in ("equal", "free")})


def describe(dims):
    """8x32x32x128 O128 K3 plus:e: the shape, then what is not as usual."""
    shape = [*dims.get("shape", ()), *(dims[n] for n in "BHWNC" if n in dims)]
    usual = dict(stride=1, scale=1, pad=(dims.get("K", 0) // 2,) * 2)
    words = ["x".join(map(str, shape))] if shape else []
    for name, value in dims.items():
        if name not in ("shape", *"BHWNC") and value and value != usual.get(name):
            value = "".join(map(str, value)) if name == "pad" else value
            words.append(f"{name}{value}" if len(name) == 1 else f"{name}:{value}")
    return " ".join(words)


def number(value, digits=3):
    """At least `digits` digits that count, without an exponent; a dash for nothing."""
    if not value:
        return "-"
    return f"{value:.{max(0, min(digits - 1 - math.floor(math.log10(value)), 6))}f}"


WIDTHS = (5, 8, 8, 6, 6, 8, 8, 8, 6)


def print_table(title, rows):
    """Rows by their time in a step, then all calls of each op, then of all; returns these last ones."""
    rows.sort(key=lambda row: -row["ms"] * (row["calls"] or 1))
    names = {row["op"] for row in rows if row["calls"]}
    ops = [together(op, [row for row in rows if row["op"] == op]) for op in names]
    ops = ops and [*sorted(ops, key=lambda row: -row["ms"]), together("total", rows)]
    wide = max(len(row["shape"]) for row in rows)

    def line(op, shape, *cells):
        print(f"  {op:<18} {shape:<{wide}}" + "".join(f" {c:>{w}}" for c, w in zip(cells, WIDTHS)))

    print(f"\n{title}")
    line("op", "shape", "calls", "ms", "GFLOP/s", "GB/s", "roof", "PyTorch", "ratio ", "sum ms", "share")
    for row in [*rows, *ops]:
        calls = row["calls"] if "dims" in row else 1  # the others are sums
        mark = "!" if not row["free"] else " " if row["equal"] else "*"
        if row in ops[:1]:
            print("  all calls of an op")
        line(
            row["op"], row["shape"], row["calls"] or "-", number(row["ms"]), number(row["gflops"]),
            number(row["gbs"], 2), f"{100 * row['roof']:.0f}%", number(row["torch_ms"]),
            (f"{row['ratio']:.2f}x" if row["ratio"] else "-") + mark,
            number(calls * row["ms"]), f"{100 * calls * row['ms'] / ops[-1]['ms']:.1f}%" if ops else "-",
        )  # fmt: skip
    return ops


def plot(path, tables, machine):
    """Roofline pictures, one for each table of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = [f for f in kernels.FAMILIES if any(FAMILY[r["op"]] == f for _, rows in tables for r in rows)]
    color = dict(zip(families, plt.get_cmap("tab10").colors))
    fig, axes = plt.subplots(
        1, len(tables), figsize=(2 + 5 * len(tables), 5.5), sharex=True, sharey=True, squeeze=False
    )
    for ax, (title, rows) in zip(axes[0], tables):
        total = sum(row["calls"] * row["ms"] for row in rows) or 1
        rows = [row for row in rows if row["flops"]]  # a copy has no place here
        at = [row["flops"] / row["bytes"] for row in rows]
        x = np.geomspace(min([0.1, *at]), max([1000, *at]), 200)
        ax.plot(x, np.minimum(machine.gflops, x * machine.gbs), "k-", lw=1.5)
        for row, where in zip(rows, at):
            c, theirs = color[FAMILY[row["op"]]], row["torch_ms"]
            if theirs:
                theirs = 1e-6 * row["flops"] / theirs
                ax.plot([where] * 2, [theirs, row["gflops"]], "-", color=c, lw=0.7, alpha=0.5)
                ax.plot(where, theirs, "o", color="white", markeredgecolor=c, markersize=4)
            size = 20 + 600 * row["calls"] * row["ms"] / total  # the area grows with the share of the step
            ax.scatter(where, row["gflops"], size, color=c, alpha=0.7, linewidths=0)
        ax.set(xscale="log", yscale="log", title=title, xlabel="FLOP per byte of arguments and results")
        ax.grid(which="major", color="0.9")
    axes[0, 0].set_ylabel("GFLOP/s")
    marks = [plt.Line2D([], [], ls="", marker="o", color=color[f], label=f) for f in families]
    marks += [plt.Line2D([], [], ls="", marker="o", color="0.4", label="nanodiff")]
    marks += [plt.Line2D([], [], ls="", marker="o", color="white", markeredgecolor="0.4", label="PyTorch")]
    marks += [
        plt.Line2D([], [], color="black", label=f"{machine.gflops:.0f} GFLOP/s,\n{machine.gbs:.0f} GB/s")
    ]
    fig.legend(handles=marks, loc="center right", frameon=False)
    fig.tight_layout(rect=(0, 0, 1 - 1.7 / fig.get_figwidth(), 1))
    fig.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument(
        "--op", nargs="+", default=[""], metavar="WORD", help="only ops with a WORD in their name"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each op and shape (default 0.2)")
    parser.add_argument("--plot", metavar="FILE", help="draw the roofline")
    parser.add_argument("--json", metavar="FILE", help="write the last line there too")
    args = parser.parse_args()
    chosen = [op for op in CASES if any(word in op for word in args.op)]
    if not chosen:
        parser.error(f"--op {' '.join(args.op)}: no op is called so; there are {', '.join(CASES)}")
    os.environ |= train_step.environment(args.threads)  # read by Numba and PyTorch as they load, from here on
    try:
        import torch

        torch.set_num_threads(args.threads)
    except ImportError:
        torch = None
        print("PyTorch is not installed: nanodiff alone", file=sys.stderr)

    result = {"cpu": train_step.cpu_name(), "threads": args.threads, "load": round(os.getloadavg()[0], 2)}
    machine = peaks(args.threads)
    result |= {"peak_gflops": round(machine.gflops, 1), "peak_gbs": round(machine.gbs, 1)}
    result |= {"networks": [], "other": []}
    print(
        f"{result['cpu']}, {args.threads} threads: {machine.gflops:.0f} GFLOP/s, {machine.gbs:.1f} GB/s;",
        end=" ",
    )
    print(f"load before: {result['load']}")  # near 0 on a machine fit to measure on

    called, tables = set(), []
    for name in NETWORKS if args.network == "all" else [args.network]:
        config, batch = NETWORKS[name], BATCH[name]
        made, _, result["versions"] = train_step.nanodiff_side(config, batch)
        step = made.pop("step")
        calls = watched(step)
        called |= {op for op, _ in calls}
        entry = {"network": name, "batch": batch}
        if args.op == [""]:
            entry |= whole_step(step, torch and (config, batch, True, False, args.threads))
        del step, made  # and its network
        rows = [
            measure(op, dict(dims), torch, machine, args.seconds) | {"calls": count}
            for (op, dims), count in calls.items()
            if op in chosen
        ]
        if rows:
            size, channels = config["sample_size"], config["in_channels"]
            title = f"{name}, {batch}x{size}x{size}x{channels}"
            tables.append((title, rows))
            entry |= {"ops": print_table(f"{title}, one training step", rows), "rows": rows}
            if "step_ms" in entry:
                theirs = f", PyTorch's {entry['torch_step_ms']:.1f} ms" if torch else ""
                print(f"  the whole step, not op by op, takes {entry['step_ms']:.1f} ms{theirs}")
            result["networks"].append(entry)
    rest = [op for op in chosen if op not in called]
    if rest:
        result["other"] = [
            measure(op, CASES[op].bench, torch, machine, args.seconds) | {"calls": 0} for op in rest
        ]
        print_table("called by no step above", result["other"])
    rows = [*(row for entry in result["networks"] for row in entry["rows"]), *result["other"]]
    if not all(row["equal"] for row in rows):
        print("\n* PyTorch does something else here: noise of its own, less work, or nothing of the kind")
    if not all(row["free"] for row in rows):
        print("\n! another program used the cores meanwhile, three times over: do not trust these")
    if torch:
        result["versions"] |= {"torch": torch.__version__}
    if args.plot:
        plot(args.plot, tables or [("called by no step", result["other"])], machine)
    line = json.dumps(result, default=float)
    if args.json:
        with open(args.json, "w") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
