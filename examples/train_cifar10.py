"""Colour photographs, 32x32, of ten kinds: what a larger network needs on top of the MNIST example.

    python examples/train_cifar10.py [--data FOLDER] [--steps 100000] [--device gpu]

Three things change: half of the images are mirrored, dropout keeps the network from learning 50,000 images
by heart, and attention works at 16x16. --full is the 35.7M network of the DDPM paper (Ho et al. 2020), there
trained for 800,000 steps of 128: one for a GPU. The default shows coloured shapes within hours on a CPU.
"""

import argparse
import time

import nanodiff as nd
from nanodiff.data import batch_indices, flip, to_float
from nanodiff.images import grid, save_png

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--data", default="cifar10", help="cifar10 (downloads), or a folder with data_batch_*.bin"
)
parser.add_argument("--steps", type=int, default=100_000, help="training steps (default: %(default)s)")
parser.add_argument("--batch", type=int, default=64, help="images per step (default: %(default)s)")
parser.add_argument(
    "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
)
parser.add_argument("--samples", type=int, default=64, help="images in the end (default: %(default)s)")
parser.add_argument("--out", default="cifar10.png", help="where they go (default: %(default)s)")
parser.add_argument("--full", action="store_true", help="the network of the DDPM paper")
args = parser.parse_args()

images = nd.load_data(args.data).images  # uint8 (50000,32,32,3)
widths = (128, 256, 256, 256) if args.full else (64, 128, 128)
deep = len(widths) - 2
config = nd.UNetConfig(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    block_out_channels=widths,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * deep),  # attention at 16x16
    up_block_types=(*["UpBlock2D"] * deep, "AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2 if args.full else 1,
    attention_head_dim=None if args.full else 32,
    norm_num_groups=32 if args.full else 8,
    dropout=0.1,
)
model = nd.UNet(config, device=args.device, seed=0)
opt = nd.Adam(model.params, lr=2e-4, clip=1.0, ema=0.9999 if args.full else 0.999)
diff = nd.Diffusion(timesteps=1000, schedule="cosine", prediction="v")
print(f"{len(images)} images, {model.params.count:,} weights, {args.steps} steps")

for step in range(args.steps):
    x0 = to_float(flip(images[batch_indices(len(images), args.batch, step, seed=0)], seed=0, step=step))
    loss = nd.train_step(model, opt, diff, x0, key=(0, step), lr=2e-4 * min(1, (step + 1) / 1000))
    if step == 0:  # which compiled the kernels
        start = time.perf_counter()
    if step == 20 or step and step % 200 == 0:
        hours = (time.perf_counter() - start) / step * (args.steps - step) / 3600
        print(f"step {step}  loss {loss:.4f}  about {hours:.1f} h left", flush=True)

with opt.with_ema():
    samples = nd.ddim_sample(model, diff, (args.samples, *images.shape[1:]), steps=50, seed=0)
save_png(args.out, grid(samples, scale=2))
