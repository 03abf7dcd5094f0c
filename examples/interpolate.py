"""A walk between two images through the noise they are made of.

    python -m nanodiff train                              # makes runs/glyphs, in minutes
    python examples/interpolate.py [RUN] [--steps 50] [--device cpu]

DDIM with eta = 0 is a function: noise in, image out; walked backwards it finds the noise of a given image.
Between the noises of two real images lies an arc (a straight line would leave the sphere where normals live),
and DDIM makes an image of each of its points (Song et al. 2020, section 5.3). Printed is how far an image is
from itself after the way to noise and back, which says how well the inversion works.
"""

import argparse

import numpy as np

import nanodiff as nd
from nanodiff.data import to_float
from nanodiff.images import grid, save_png

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", nargs="?", default="runs/glyphs", help="a run folder (default: %(default)s)")
parser.add_argument("--steps", type=int, default=50, help="of DDIM (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--pairs", type=int, default=6, help="how many walks (default: %(default)s)")
parser.add_argument("--out", default="interpolate.png", help="where they go (default: %(default)s)")
args = parser.parse_args()

run = nd.load_run(args.run, args.device)
data = nd.load_data(run.settings["data"], size=run.shape[:2])
chosen = np.linspace(0, len(data.images) - 1, 2 * args.pairs).astype(int)
images = to_float(data.images[chosen])
told = data.labels[chosen] if run.model.config.num_class_embeds else None


def slerp(a, b, u):  # u = 0: a, u = 1: b, and between them along the arc
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    angle = np.arccos(cosine.clip(-1, 1))
    return (np.sin((1 - u) * angle) * a + np.sin(u * angle) * b) / np.sin(angle)


for steps in (args.steps // 2, args.steps):
    noise = nd.ddim_invert(run.model, run.diffusion, images, steps, labels=told)
    back = nd.ddim_sample(run.model, run.diffusion, images.shape, steps, clip=False, start=noise, labels=told)
    error = np.linalg.norm(back - images) / np.linalg.norm(images)
    print(f"to noise and back in {steps} steps: off by {error:.1%}", flush=True)

rows = []
for a in range(0, 2 * args.pairs, 2):
    walk = np.stack([slerp(noise[a], noise[a + 1], u) for u in np.linspace(0, 1, 8)])
    half = None if told is None else np.repeat(told[a : a + 2], 4)
    x = nd.ddim_sample(run.model, run.diffusion, walk.shape, args.steps, start=walk, labels=half)
    rows += [images[a : a + 1], x, images[a + 1 : a + 2]]
save_png(args.out, grid(np.concatenate(rows), columns=10, scale=2))
print(f"{args.pairs} walks, real images at both ends, in {args.out}")
