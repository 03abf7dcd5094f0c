"""Ask for a class, and ask louder: classifier-free guidance, from training to a grid.

    python examples/guided.py [--data glyphs] [--steps 1500] [--device cpu]

One network learns two things: told the class of an image, and, for one image in eight, told "none" (the
last row of its table). Sampling then goes from what it says without the class to what it says with it, and
further: u + g (c - u). Row by row: g = 0 (nobody asked), 1 (asked), 2, 4 (insisted on); a column is a class.
Printed is how many samples lie nearest to the mean image of the class that was asked for.
Ho and Salimans 2022, arXiv:2207.12598.
"""

import argparse

import numpy as np

import nanodiff as nd
from nanodiff.data import batch_indices, to_float
from nanodiff.images import grid, save_png
from nanodiff.optim import learning_rate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--data", default="glyphs", help="glyphs, mnist, cifar10 or a folder (default: %(default)s)"
)
parser.add_argument("--steps", type=int, default=1500, help="training steps (default: %(default)s)")
parser.add_argument("--batch", type=int, default=32, help="images per step (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--samples", type=int, default=16, help="per row (default: %(default)s)")
parser.add_argument("--out", default="guided.png", help="where they go (default: %(default)s)")
args = parser.parse_args()

data = nd.load_data(args.data)
H, W, C = data.images.shape[1:]
classes = int(data.labels.max()) + 1
config = nd.UNetConfig(
    in_channels=C, out_channels=C, block_out_channels=(16, 32, 64), num_class_embeds=classes + 1
)
model = nd.UNet(config, device=args.device, seed=0)
opt = nd.Adam(model.params, lr=2e-3, clip=1.0, ema=0.999)
diff = nd.Diffusion(prediction="v")

for step in range(args.steps):
    chosen = batch_indices(len(data.images), args.batch, step, seed=0)
    lr = learning_rate(step, args.steps, peak=2e-3, warmup=100, decay="cosine")
    x0, labels = to_float(data.images[chosen]), data.labels[chosen]
    loss = nd.train_step(model, opt, diff, x0, labels, key=(0, step), lr=lr, label_drop=1 / 8)
    if step % 100 == 0:
        print(f"step {step} of {args.steps}  loss {loss:.4f}", flush=True)

means = np.stack([to_float(data.images[data.labels == k][:500]).mean(0) for k in range(classes)])
asked, rows = np.arange(args.samples) % classes, []
with opt.with_ema():
    for g in (0.0, 1.0, 2.0, 4.0):
        x = nd.ddim_sample(model, diff, (args.samples, H, W, C), steps=50, seed=1, labels=asked, guidance=g)
        distance = ((x[:, None] - means) ** 2).sum((2, 3, 4))
        hits = (distance.argmin(1) == asked).mean()
        print(f"guidance {g:g}: {hits:.0%} are nearest to the class asked for", flush=True)
        rows.append(x)
save_png(args.out, grid(np.concatenate(rows), columns=args.samples, scale=2))
print(f"four rows of {args.samples} in {args.out}")
