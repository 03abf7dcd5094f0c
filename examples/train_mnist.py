"""Digits out of noise: the whole of diffusion training in one flat loop, on MNIST.

    python examples/train_mnist.py [--data FOLDER] [--steps 3800] [--device cpu]

Noise is mixed into digits, the network learns to tell what was mixed in, and then it can take noise away from
pure noise, a little at a time. `python -m nanodiff train --data mnist` does the same and survives a kill.
"""

import argparse
import time

import nanodiff as nd
from nanodiff.data import batch_indices, to_float
from nanodiff.images import grid, save_png
from nanodiff.optim import learning_rate

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="mnist", help="mnist (is downloaded), or a folder with its four files")
parser.add_argument("--steps", type=int, default=3800, help="training steps (default: %(default)s)")
parser.add_argument("--batch", type=int, default=32, help="images per step (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--samples", type=int, default=64, help="images in the end (default: %(default)s)")
parser.add_argument("--out", default="mnist.png", help="where they go (default: %(default)s)")
args = parser.parse_args()

images = nd.load_data(args.data).images  # uint8 (60000,28,28,1)
H, W, C = images.shape[1:]
config = nd.UNetConfig(
    sample_size=(H, W),
    in_channels=C,
    out_channels=C,
    block_out_channels=(32, 64, 128),  # 28x28, 14x14, 7x7
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
)
model = nd.UNet(config, device=args.device, seed=0)
opt = nd.Adam(model.params, lr=1e-3, clip=1.0, ema=0.999)
diff = nd.Diffusion(
    timesteps=1000, schedule="cosine", prediction="v"
)  # at pure noise, eps says nothing of x0
print(f"{len(images)} images, {model.params.count:,} weights, {args.steps} steps")

losses = []
for step in range(args.steps):
    x0 = to_float(images[batch_indices(len(images), args.batch, step, seed=0)])
    lr = learning_rate(step, args.steps, peak=1e-3, warmup=100, decay="cosine")
    losses.append(nd.train_step(model, opt, diff, x0, key=(0, step), lr=lr))
    if step == 0:  # which compiled the kernels
        start = time.perf_counter()
    if step == 20 or step and step % 200 == 0:
        left = (time.perf_counter() - start) / step * (args.steps - step) / 60
        mean = sum(losses[-200:]) / len(losses[-200:])
        print(f"step {step}  loss {mean:.4f}  about {left:.0f} min left", flush=True)

with opt.with_ema():  # the average of the weights draws better than the last ones
    samples = nd.ddim_sample(model, diff, (args.samples, H, W, C), steps=50, seed=0)
save_png(args.out, grid(samples, scale=2))
print(f"{args.samples} digits in {args.out}")
