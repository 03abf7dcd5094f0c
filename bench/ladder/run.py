"""The ladder: a 3x3 convolution from seven loops to the kernel that nanodiff uses, one lesson in each step.

    python bench/ladder/run.py                            # 8 images of 32x32, 128 -> 128 channels
    python bench/ladder/run.py --shape 32 16 16 64 64     # B H W C O; C and O multiples of 16

Read the files conv_1_loops.py, conv_2_vectors.py, ... in order; each begins with what it changes, what that
should gain, and why. This script compares them with the definition (nanodiff/kernels/conv_ref.py in float64:
`error` is the relative root mean square), times them, and puts PyTorch beside them if it is installed. All
start from plain weights: to pack or transform these is part of the time. GFLOP/s counts the operations of a
direct sum, 2 * 9 * C * O for a pixel, whatever a step really does. The peak is what the multiply-add units of
all threads can do, measured on registers alone: Winograd and the matrix unit may exceed it, and steps 1-4,
which run on one thread, cannot come near. The last line of stdout is one JSON object.
"""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

import numpy as np

from nanodiff.kernels import conv_ref, parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.simd_cpu import PANEL, ROWS, at, make_product

STEPS = sorted(path.stem for path in Path(__file__).parent.glob("conv_?_*.py"))
LONG = 1.0  # seconds: a step that would take longer is timed on one image
product = make_product(ROWS)


@parallel
def multiply_adds(job, worker, a, b, sums):
    """ROWS x 16 sums, always the same vector of b: a step of the loop is multiply-adds and two loads."""
    for _ in range(400):
        product(at(a, 0), 0, at(b, 0), 0, at(sums, job * ROWS * PANEL), PANEL, a.size, 1)


def peak(jobs):
    """GFLOP/s of all threads, the best of several tries."""
    a, b, sums = (np.zeros(n, np.float32) for n in (1000, PANEL, jobs * ROWS * PANEL))
    times = timed(lambda: multiply_adds(jobs, a, b, sums))
    return 1e-9 * 400 * jobs * 2 * ROWS * PANEL * a.size / min(times)


def timed(call, most=30, limit=1.0):
    """Seconds of each of up to `most` calls, in about `limit` seconds, after one that may compile."""
    call()
    times = []
    while len(times) < most and (len(times) < 3 or sum(times) < limit):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def error(out, want):
    """Root mean square of the difference, relative to that of `want`."""
    return float(np.sqrt(np.square(out - want).mean() / np.square(want).mean()))


def measure(conv, x, weight, bias, want):
    """A row of the table as a dict; `want` has the right results."""
    rms = error(conv(x[:1], weight, bias), want[:1])
    begin = time.perf_counter()
    conv(x[:1], weight, bias)
    images = 1 if len(x) * (time.perf_counter() - begin) > LONG else len(x)
    if images > 1:
        rms = error(conv(x, weight, bias), want)
    seconds = statistics.median(timed(lambda: conv(x[:images], weight, bias)))
    flop = 2 * weight.size * images * x.shape[1] * x.shape[2]
    ms = 1e3 * seconds * len(x) / images
    return {"error": rms, "ms": ms, "gflops": 1e-9 * flop / seconds, "scaled": images < len(x)}


def torch_conv(threads):
    """PyTorch's convolution as a conv(x, weight, bias) on NumPy arrays, or None; and a line that names it."""
    try:
        import torch
    except ImportError:
        return None, "PyTorch (not installed)"
    torch.set_num_threads(threads)
    layout = torch.channels_last

    @torch.inference_mode()
    def conv(x, weight, bias):  # views of NumPy's memory; images are in its layout already
        x, weight = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(weight).permute(3, 2, 0, 1)
        out = torch.nn.functional.conv2d(
            x, weight.contiguous(memory_format=layout), torch.from_numpy(bias), padding=1
        )
        return out.permute(0, 2, 3, 1).numpy()

    return conv, f"PyTorch {torch.__version__}, channels_last"


def show(title, row, gain, top):
    """One line of the table."""
    star = "*" if row["scaled"] else " "
    figures = f"{row['error']:9.1e} {row['ms']:9.2f}{star} {row['gflops']:9.1f} {gain:>9}"
    print(f"{title:<46} {figures} {100 * row['gflops'] / top:8.1f} %", flush=True)


def main():
    parser = argparse.ArgumentParser(description="A 3x3 convolution, step by step faster: checked and timed.")
    parser.add_argument("--shape", type=int, nargs=5, default=(8, 32, 32, 128, 128), metavar=tuple("BHWCO"))
    parser.add_argument("--threads", type=int, default=parallel_cpu.max_threads())
    args = parser.parse_args()
    B, H, W, C, O = args.shape
    if min(*args.shape, args.threads) < 1 or C % 16 or O % 16:
        parser.error("shape and threads must be positive, C and O multiples of 16")
    parallel_cpu.set_threads(args.threads)
    rng = np.random.default_rng(0)
    shapes = (B, H, W, C), (3, 3, C, O), (O,)
    x, weight, bias = (rng.standard_normal(dtype=np.float32, out=empty(shape)) for shape in shapes)
    weight /= np.float32((9 * C) ** 0.5)
    want = conv_ref.conv_forward(*(a.astype(np.float64) for a in (x, weight, bias)), pad=(1, 1))

    top = peak(8 * args.threads)
    print(f"({B},{H},{W},{C}) -> {O}: {2e-9 * weight.size * B * H * W:.3g} GFLOP as a direct sum")
    print(f"{args.threads} threads from step 5 on; their peak in float32: {top:.0f} GFLOP/s\n")
    print(f"{'step':<46} {'error':>9} {'ms':>9}  {'GFLOP/s':>9} {'x before':>9} {'of peak':>10}")
    steps, last = {}, None
    for name in STEPS:
        step = importlib.import_module(name)
        title = step.__doc__.partition("\n")[0].rstrip(".")
        if getattr(step, "available", True):
            steps[name] = measure(step.conv, x, weight, bias, want)
            show(title, steps[name], f"{last / steps[name]['ms']:.2f}x" if last else "", top)
            last = steps[name]["ms"]
        else:
            print(f"{title:<46} left out: this machine has none, or NANODIFF_AMX is set")
    conv, title = torch_conv(args.threads)
    if conv:
        steps["torch"] = measure(conv, x, weight, bias, want)
        show(title, steps["torch"], "", top)
        print(f"\nthe last step is {steps['torch']['ms'] / last:.2f} times as fast as PyTorch")
    else:
        print(title)
    if any(row["scaled"] for row in steps.values()):
        print("* timed on one image and multiplied")
    print(json.dumps({"shape": args.shape, "threads": args.threads, "peak_gflops": top, "steps": steps}))


if __name__ == "__main__":
    main()
