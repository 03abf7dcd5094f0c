"""An image, made over: noised part of the way, then denoised; the further, the less of it is left.

    python -m nanodiff train                              # makes runs/glyphs, in minutes
    python examples/image_to_image.py [RUN] [--steps 50] [--device cpu]

SDEdit (Meng et al. 2021, arXiv:2108.01073). A strength of 0.5 starts half way: the image is noised to the
time at half of the step list, and the steps below it do the rest. Printed is how far the results are from the
images they started from.
"""

import argparse

import numpy as np

import nanodiff as nd
from nanodiff.data import to_float
from nanodiff.images import grid, save_png
from nanodiff.kernels.random_ref import NOISE, normal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", nargs="?", default="runs/glyphs", help="a run folder (default: %(default)s)")
parser.add_argument("--steps", type=int, default=50, help="of a whole sampling (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--count", type=int, default=12, help="images (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
parser.add_argument("--out", default="image_to_image.png", help="where they go (default: %(default)s)")
args = parser.parse_args()

run = nd.load_run(args.run, args.device)
diff, data = run.diffusion, nd.load_data(run.settings["data"], size=run.shape[:2])
chosen = np.linspace(0, len(data.images) - 1, args.count).astype(int)
images = to_float(data.images[chosen])
told = data.labels[chosen] if run.model.config.num_class_embeds else None
eps = normal(images.shape, args.seed, 0, NOISE)
times = [t for t, _ in nd.step_list(diff.timesteps, args.steps)]

rows = [images]
for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
    left = times[len(times) - max(1, round(strength * len(times))) :]
    a, s = diff.scales(np.full(args.count, left[0]))
    start = a.reshape(-1, 1, 1, 1) * images + s.reshape(-1, 1, 1, 1) * eps
    x = nd.ddim_sample(run.model, diff, images.shape, None, spacing=left, start=start, labels=told)
    error = np.linalg.norm(x - images) / np.linalg.norm(images)
    print(f"strength {strength}: from t = {left[0]} in {len(left)} steps, {error:.0%} away")
    rows.append(x)
save_png(args.out, grid(np.concatenate(rows), columns=args.count, scale=2))
print(f"the images and five strengths in {args.out}")
