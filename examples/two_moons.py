"""Diffusion in two dimensions: a cloud of noise falls apart into two moons, in ten seconds.

    python examples/two_moons.py [--steps 3000] [--device cpu] [--seed 0] [--out two_moons.gif]

An "image" is a point here, its two pixels are x and y, and a small MLP takes the place of the UNet. All else
is what images need too: noise is mixed in, a network learns to tell it apart, a sampler takes it away again.
"""

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw

import nanodiff as nd
from nanodiff.images import save_gif
from nanodiff.layers import Linear
from nanodiff.optim import learning_rate
from nanodiff.params import Params


def moons(angle, upper):  # (n,), (n,) bools -> (n, 2)
    """Points on two half circles that reach into each other, centred, and small enough for [-1, 1]."""
    x, y = np.cos(angle), np.sin(angle)
    return np.stack([np.where(upper, x, 1 - x) - 0.5, np.where(upper, y, 0.5 - y) - 0.25], axis=1) / 1.8


CURVE = moons(np.tile(np.linspace(0, np.pi, 500), 2), np.arange(1000) < 500)


def draw_data(rng, n):  # -> (n, 2)
    return moons(rng.uniform(0, np.pi, n), rng.random(n) < 0.5) + 0.03 * rng.standard_normal((n, 2))


class MLP:
    """silu(W1 (x, y) + W2 sinusoids(t)), two more hidden layers, and out come two numbers for each point."""

    def __init__(self, ctx, seed, width=128):
        self.ctx, self.params, self.layers, self.init = ctx, Params(), [], "torch"  # what layers look for
        self.point, self.time = Linear(self, "point", 2, width), Linear(self, "time", 64, width)
        self.rest = [Linear(self, f"rest.{i}", width, n) for i, n in enumerate((width, width, 2))]
        self.params.allocate(ctx, seed)

    def forward(self, x, t):  # (B, 2), (B,) ints -> (B, 2)
        k = self.ctx.k
        point = self.point.forward(k.affine(x, 10, 0))  # or 0.03, the width of a moon, is nothing to a SiLU
        waves = k.time_embedding(t, 64, True, 0, self.ctx.dtype)
        h, self.before_silu = k.add(point, self.time.forward(waves)), []
        for layer in self.rest:
            self.before_silu.append(h)
            h = layer.forward(k.activation_forward(h, "silu"))
        return h

    def backward(self, dout):
        for layer in reversed(self.rest):
            dout = self.ctx.k.activation_backward(layer.backward(dout), self.before_silu.pop(), "silu")
        self.point.backward(dout)  # a sum hands its gradient to both of its terms
        self.time.backward(dout)

    def __call__(self, x, t):  # as samplers want a model: over arrays of the host
        return self.ctx.to_host(self.forward(self.ctx.to_device(x), t))


def train(ctx, diff, steps, seed, batch=256):
    """Every step: points, times, noise; mix; guess; learn from the error (Ho et al. 2020, algorithm 1)."""
    rng, model = np.random.default_rng(seed), MLP(ctx, seed)
    opt = nd.Adam(model.params, lr=1e-2)
    ctx.saving = True  # layers keep what their backward needs
    for step in range(steps):
        t = rng.integers(0, diff.timesteps, batch)
        x0, eps = ctx.to_device(draw_data(rng, batch)), ctx.to_device(rng.standard_normal((batch, 2)))
        xt, target = ctx.k.q_sample(x0, eps, *map(ctx.to_device, diff.scales(t)), diff.prediction)
        loss, dout = ctx.k.mse_loss(model.forward(xt, t), target)
        model.params.zero_grad()
        model.backward(dout)
        opt.step(loss, lr=learning_rate(step, steps, opt.lr, warmup=100, decay="cosine"))
    ctx.saving = False
    return model


def to_curve(points):  # (n, 2) -> (n,) distances, (n,) which point of CURVE is nearest
    squares = ((points[:, None] - CURVE) ** 2).sum(2)
    return np.sqrt(squares.min(1)), squares.argmin(1)


def picture(points, upper, side=400, view=1.6):  # -> uint8 (side, side, 3), `upper` tells the colour
    image = Image.new("RGB", (2 * side, 2 * side), "white")  # halved in the end, which smooths the dots
    dots = [(p, 9, "#e6e6e6") for p in CURVE]
    dots += [(p, 4, "#d1495b" if up else "#30638e") for p, up in zip(points, upper)]
    for place, radius, color in dots:
        ImageDraw.Draw(image).circle((place * (1, -1) / view + 1) * side, radius, color)
    return np.asarray(image.reduce(2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--out", default="two_moons.gif", help="the animation (default: %(default)s)")
    args = parser.parse_args()

    diff, frames, start = nd.Diffusion(prediction="v"), [], time.perf_counter()
    model = train(nd.Context(args.device), diff, args.steps, args.seed)
    print(f"{args.steps} steps in {time.perf_counter() - start:.1f} s, {model.params.count:,} weights")
    keep = dict(callback=lambda i, n, t, x, x0: frames.append(x))
    distance, nearest = to_curve(nd.ddim_sample(model, diff, (1000, 2), steps=50, seed=args.seed, **keep))
    real, _ = to_curve(draw_data(np.random.default_rng(args.seed + 1), 1000))
    print(f"mean distance to the moons {distance.mean():.4f}, that of real data {real.mean():.4f}")
    save_gif(args.out, [picture(x, nearest < 500) for x in frames])
