"""The ladder on a GPU: a 3x3 convolution and a group norm, from one thread per output to nanodiff's kernels.

    python bench/ladder/run_gpu.py                             # 128 images of 32x32, 128 -> 128 channels
    python bench/ladder/run_gpu.py --shape 128 16 16 256 256   # B H W C O; C and O multiples of 128

Read gpu_conv_1_naive.cu, gpu_conv_2_coalesced.cu, ... and gpu_norm_1_naive.cu, ... in order; each begins with
what it changes and what that should gain. All take bfloat16 activations and weights and sum in float32.
Errors are relative root mean squares, against the definition in float64 on the first two images; writing the
result as bfloat16 makes one of 1.7e-3. The last line of stdout is one JSON object.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from nanodiff import kernels
from nanodiff.context import NanodiffError
from nanodiff.kernels import conv_ref, device_gpu, norm_ref
from nanodiff.kernels.device_gpu import BF16, empty, launch

HERE = Path(__file__).parent
EPS, GROUPS = 1e-5, 32
BFLOAT16 = (("ELEMENT", "bf16"),)


def struct(**fields):
    """A C struct of ints and floats, to be passed by value."""
    types = [(name, "f4" if isinstance(value, float) else "i4") for name, value in fields.items()]
    return np.array([tuple(fields.values())], types)


def conv(name, x, weight, bias):  # bfloat16 (B,H,W,C), bfloat16 (3,3,C,O), float32 (O,) -> bfloat16 (B,H,W,O)
    """The convolution of a step of the ladder."""
    B, H, W, C = x.shape
    O, pixels = weight.shape[3], B * H * W
    out, (M, N), threads, smem = empty((B, H, W, O), BF16), (1, 1), 256, 0
    if "tiles" in name or "tensor_cores" in name:
        M, N, threads, smem = (64, 64, 256, 0) if "tiles" in name else (64, 64, 128, (64 * 40 + 32 * 72) * 2)
    elif "pipeline" in name:
        M, N, threads, smem = 128, 128, 128, 3 * (128 + 128) * 64 * 2
    grid = (-(-pixels // M), O // N) if M > 1 else (-(-pixels * O // threads),)
    args = x, weight, bias, out, struct(B=B, H=H, W=W, C=C, O=O)
    launch(str(HERE / f"{name}.cu"), "conv", grid, (threads,), args, smem, BFLOAT16)
    return out


def norm(
    name, x, weight, bias, groups=GROUPS
):  # bfloat16 (B,H,W,C), float32 (C,) twice -> bfloat16 (B,H,W,C)
    """The group norm with SiLU of a step of the ladder."""
    B, H, W, C = x.shape
    out, source, p = empty(x.shape, BF16), str(HERE / f"{name}.cu"), struct(
        B=B, pixels=H * W, C=C, groups=groups, eps=EPS
    )  # fmt: skip
    if "naive" in name:
        mean, rstd = (empty((B, groups), np.float32) for _ in range(2))
        launch(source, "statistics", (-(-B * groups // 256),), (256,), (x, mean, rstd, p), 0, BFLOAT16)
        args = x, weight, bias, mean, rstd, out, p
        launch(source, "normalise", (-(-x.size // 256),), (256,), args, 0, BFLOAT16)
        return out
    grid = (groups, B) if "block" in name else (C // 32, B)
    launch(source, "groupnorm", grid, (256,), (x, weight, bias, out, p), 0, BFLOAT16)
    return out


def steps(family, k=None):
    """[(title, function), ...]: the files of a family in order; with k, the GPU's ops, nanodiff's too."""
    made = {"conv": conv, "norm": norm}[family]
    found = []
    for path in sorted(HERE.glob(f"gpu_{family}_?_*.cu")):
        title = path.read_text().partition("\n")[0].removeprefix("// ").rstrip(".")
        found.append((title, lambda *args, name=path.stem: made(name, *args)))
    if k and family == "conv":
        found.append(("nanodiff", lambda x, w, b: k.conv_forward(x, w, b, 1, (1, 1))))
    elif k:
        found.append(("nanodiff", lambda x, w, b: k.groupnorm_forward(x, w, b, GROUPS, EPS, True)[0]))
    return found


def rounded(a):
    """float32 as bfloat16 bits, to nearest; and back."""
    bits = a.view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return bits.astype(BF16), (bits << np.uint32(16)).view(np.float32)


def values(bits):
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def arguments(family, B, H, W, C, O, groups=GROUPS):
    """Device arrays for the steps of a family, and the right result of the first two images, float64."""
    rng = np.random.default_rng(0)
    x, x_exact = rounded(rng.standard_normal((B, H, W, C), np.float32))
    first = x_exact[:2].astype(np.float64)
    if family == "conv":
        weight, w_exact = rounded(rng.standard_normal((3, 3, C, O), np.float32) / np.float32((9 * C) ** 0.5))
        bias = rng.standard_normal(O, np.float32)
        want = conv_ref.conv_forward(first, w_exact.astype(np.float64), bias.astype(np.float64), 1, (1, 1))
        return [device_gpu.upload(a) for a in (x, weight, bias)], want, w_exact
    weight, bias = rng.standard_normal((2, C), np.float32)
    want = norm_ref.groupnorm_forward(
        first, *(a.astype(np.float64) for a in (weight, bias)), groups, EPS, True
    )
    return [device_gpu.upload(a) for a in (x, weight, bias)], want[0], None


def error(out, want):
    """Root mean square of the difference in the images of `want`, relative to theirs."""
    got = values(device_gpu.download(out[: len(want)]))
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


def milliseconds(call, repeats=20):
    """Median time of a call on the device, by events."""
    import cupy

    times = []
    for _ in range(3 + repeats):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return statistics.median(times[3:])


def main():
    parser = argparse.ArgumentParser(description="GPU kernels, step by step faster: checked and timed.")
    parser.add_argument("--shape", type=int, nargs=5, default=(128, 32, 32, 128, 128), metavar=tuple("BHWCO"))
    args = parser.parse_args()
    B, H, W, C, O = args.shape
    if min(args.shape) < 1 or C % 128 or O % 128:
        parser.error("shape must be positive, C and O multiples of 128")
    try:
        backend = device_gpu.backend()
    except NanodiffError as problem:
        print(f"run_gpu.py: {problem}", file=sys.stderr)
        return 2
    k, result = kernels.load("gpu"), {"gpu": backend.name, "shape": args.shape}
    for family, amount, unit in (
        ("conv", 2 * 9 * B * H * W * C * O / 1e9, "TFLOP/s"),
        ("norm", 2 * 2 * B * H * W * C / 1e6, "GB/s"),  # read once and written once, two bytes each
    ):
        inputs, want, weight = arguments(family, *args.shape)
        print(f"\n{family}, ({B},{H},{W},{C}){f' -> {O}' if family == 'conv' else ''} on {backend.name}")
        print(f"{'step':<66} {'error':>9} {'ms':>9} {unit:>9} {'x before':>9}")
        rows, last = [], None
        for title, call in steps(family, k):
            if title == "nanodiff" and weight is not None:  # it keeps float32 weights and their bfloat16 copy
                flat = device_gpu.upload(weight.ravel())
                device_gpu.register_shadow(flat)
                k.prepare_weights(flat, "bfloat16")
                inputs[1] = flat.reshape(weight.shape)
            ms = milliseconds(lambda: call(*inputs))  # noqa: B023
            row = dict(step=title, error=error(call(*inputs), want), ms=ms, rate=amount / ms)
            gain = f"{last / ms:.2f}x" if last else ""
            print(f"{title:<66} {row['error']:9.1e} {ms:9.3f} {row['rate']:9.1f} {gain:>9}", flush=True)
            rows.append(row)
            last = ms
        result[family] = rows
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
