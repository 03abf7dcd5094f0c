"""Half an image is known, the network finds the other half: by replacing, and by RePaint.

    python -m nanodiff train                              # makes runs/glyphs, in minutes
    python examples/inpaint.py [RUN] [--steps 50] [--repeats 5] [--device cpu]

Replacing: after each step the known half is put back, noised to where the step has led. The new half is then
made to fit the known one, but the known one never moves, and the halves may not match. RePaint (Lugmayr et
al. 2022, arXiv:2201.09865) walks each stretch of steps several times: back up to more noise, which mixes the
halves, and down again. Printed is the jump across the seam, beside that of the real images.
"""

import argparse
import math

import numpy as np

import nanodiff as nd
from nanodiff.data import to_float
from nanodiff.images import grid, save_png
from nanodiff.kernels.random_ref import NOISE, normal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", nargs="?", default="runs/glyphs", help="a run folder (default: %(default)s)")
parser.add_argument("--steps", type=int, default=50, help="levels of noise (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=5, help="walks over a stretch (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--count", type=int, default=12, help="images (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
parser.add_argument("--out", default="inpaint.png", help="where they go (default: %(default)s)")
args = parser.parse_args()

run = nd.load_run(args.run, args.device)
diff, data = run.diffusion, nd.load_data(run.settings["data"], size=run.shape[:2])
chosen = np.linspace(0, len(data.images) - 1, args.count).astype(int)
images = to_float(data.images[chosen])
told = data.labels[chosen] if run.model.config.num_class_embeds else None
shape, half = images.shape, run.shape[0] // 2
known = np.arange(run.shape[0])[:, None, None] < half  # the upper half
pairs = nd.step_list(diff.timesteps, args.steps)


def put_back(x, p):  # the known half, with as much noise as x has at time p
    alpha_bar = diff.alpha_bar[p] if p >= 0 else 1.0
    noise = normal(shape, args.seed, max(p, 0), NOISE)
    return np.where(known, math.sqrt(alpha_bar) * images + math.sqrt(1 - alpha_bar) * noise, x)


def walk(pairs, start, seed):  # DDPM's steps over some pairs, the known half put back after each
    def rule(t, p, v):
        return diff.step_back(t, p, 1.0)

    return nd.sample(run.model, diff, shape, pairs, rule, seed, start=start, edit=put_back, labels=told)


def repaint(stretch=5):
    x = None
    for first in range(0, len(pairs), stretch):
        part = pairs[first : first + stretch]
        (top, _), (_, bottom) = part[0], part[-1]
        for again in range(args.repeats):
            if again:  # from time `bottom` back up to `top`: x_top = sqrt(r) x + sqrt(1 - r) noise
                r = diff.alpha_bar[top] / (diff.alpha_bar[bottom] if bottom >= 0 else 1.0)
                x = math.sqrt(r) * x + math.sqrt(1 - r) * normal(shape, args.seed + again, top, NOISE)
            x = walk(part, x, args.seed + again)
    return x


def seam(x):  # mean jump from the last known line to the first new one
    return np.abs(x[:, half] - x[:, half - 1]).mean()


print(f"real images: {seam(images):.3f} across the seam")
rows = [images, np.where(known, images, -1)]
for name, x in (("replacing", walk(pairs, None, args.seed)), ("RePaint", repaint())):
    print(f"{name}: {seam(x):.3f} across the seam")
    rows.append(x)
save_png(args.out, grid(np.concatenate(rows), columns=args.count, scale=2))
print(f"images, what is known, replacing and RePaint in {args.out}")
