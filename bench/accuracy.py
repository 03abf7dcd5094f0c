"""What the fast convolutions cost in accuracy: matrix unit (bfloat16 pairs), Winograd, direct float32 sums.

    python bench/accuracy.py

Prints, for each of the three on this machine, the relative RMS error of convolutions against float64, and the
losses of 200 training steps from the same seed, next to those of another seed: what separates two methods
must be small against what separates two seeds. Every method runs in a process of its own. The last line is
one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "matrix unit": {},
    "Winograd": {"NANODIFF_AMX": "0"},
    "direct": {"NANODIFF_CONV": "direct"},
}
SHAPES = [(2, 32, 64, 64), (2, 16, 256, 256), (8, 8, 512, 256), (1, 28, 16, 48)]  # B, H = W, C, O


def errors():
    """{shape: (out, dx, dweight)}: relative RMS errors of 3x3 convolutions of normal data."""
    from nanodiff import kernels

    rms, found = lambda a: float(np.sqrt(np.square(a, dtype=np.float64).mean())), {}
    for B, H, C, O in SHAPES:
        rng = np.random.default_rng(0)
        x, dout = (rng.standard_normal((B, H, H, n), dtype=np.float32) for n in (C, O))
        weight = rng.standard_normal((3, 3, C, O), dtype=np.float32)
        results = []
        for rendition, dtype in (("cpu", np.float32), ("ref", np.float64)):
            k, (a, d, w) = kernels.load(rendition), (v.astype(dtype) for v in (x, dout, weight))
            dweight, zero = np.zeros_like(w), np.zeros(O, dtype)
            out = k.conv_forward(a, k.conv_prepare(w, H, H, 1, (1, 1)), zero, 1, (1, 1))
            dx, _ = k.conv_backward(d, a, w, 1, (1, 1), dweight, zero.copy())
            results.append((out, dx, dweight))
        found[f"{B}x{H}x{H}x{C} -> {O}"] = [rms(a - b) / rms(b) for a, b in zip(*results)]
    return found


def losses(seed, steps):
    """Losses of training a small UNet on glyphs."""
    import nanodiff as nd
    from nanodiff.data import load_data, to_float

    images = to_float(load_data("glyphs").images)
    model, diff = nd.UNet(nd.UNetConfig(norm_num_groups=8), seed=seed), nd.Diffusion(prediction="v")
    opt, rng = nd.Adam(model.params, lr=1e-3, clip=1.0), np.random.default_rng(seed)
    batches = (images[rng.integers(0, len(images), 16)] for _ in range(steps))
    return [nd.train_step(model, opt, diff, x0, key=(seed, i)) for i, x0 in enumerate(batches)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        from nanodiff.kernels.parallel_cpu import AMX

        out = {"amx": AMX, "errors": errors(), "losses": [losses(seed, args.steps) for seed in (0, 1)]}
        return print(json.dumps(out))

    runs = {}
    for method, env in METHODS.items():
        command = [sys.executable, __file__, "--side", "--steps", str(args.steps)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path} | env, stdout=subprocess.PIPE)
        run = json.loads(done.stdout.splitlines()[-1])
        if method == "matrix unit" and run["amx"] != 1:
            print("this processor has no matrix unit")
            continue
        runs[method] = run
        for shape, (out, dx, dweight) in run["errors"].items():
            print(f"{method:<12} {shape:<22} out {out:.1e}   dx {dx:.1e}   dweight {dweight:.1e}")
    quarter = max(1, args.steps // 4)

    def parts(values):  # means of the four quarters of a curve
        return [float(np.mean(values[i : i + quarter])) for i in range(0, 4 * quarter, quarter)]

    print(f"\nmean loss of each quarter of {args.steps} steps")
    for method, run in runs.items():
        print(f"{method:<12} " + "  ".join(f"{v:.5f}" for v in parts(run["losses"][0])))
    print("another seed " + "  ".join(f"{v:.5f}" for v in parts(runs["direct"]["losses"][1])))
    far = np.abs(np.subtract(parts(runs["direct"]["losses"][0]), parts(runs["direct"]["losses"][1])))
    for method, run in runs.items():
        near = np.abs(np.subtract(parts(run["losses"][0]), parts(runs["direct"]["losses"][0])))
        run["distance"] = [float(near.max()), float(far.max())]
        print(f"{method:<12} differs from direct by at most {near.max():.1e}; two seeds by {far.max():.1e}")
    print(json.dumps({m: {"errors": r["errors"], "distance": r["distance"]} for m, r in runs.items()}))


if __name__ == "__main__":
    main()
