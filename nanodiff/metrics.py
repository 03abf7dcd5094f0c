"""How good a model is, in numbers: bits per dimension, the variational bound."""

import math

import numpy as np

from nanodiff.context import NanodiffError
from nanodiff.kernels.random_ref import BOUND, random_bits


def bits_per_dim(model, diff, images, times=None, seed=0, labels=None, batch=16, clip=True, tick=None):
    """An upper bound on the bits that each value of an image takes (Ho et al. 2020, equation 5).

    -log2 p(x0) <= prior + sum over t of `Diffusion.bound`, divided by the values in an image. Every one of
    the T terms asks the network once for each image; with `times` fewer, the sum is estimated: [1, T) is cut
    into as many strata, one random t of each stands for all of it, and t = 0 is always there. The estimate
    is unbiased; `error` says how far it may be off.

    model   a UNet, or a callable (x, t) -> prediction over NumPy arrays, as for the samplers
    diff    the Diffusion it was trained with; its variance decides as much as the network does
    images  (N,H,W,C) float32 in [-1, 1], made of bytes: the bound's last term counts 256 levels
    times   how many t between 1 and T-1, None for all;  seed: of the noise and of those times
    labels  (N,) class numbers, for a network with classes;  clip: hold predicted images in [-1, 1]
    returns a dict in bits per dimension: total; error, its standard error over the images; prior; last, the
            term of t = 0; terms: (lowest t of a stratum, mean of its term, how many t it stands for), rising
    """
    from nanodiff.samplers import _adapt, _need_int

    T, N = diff.timesteps, len(images)
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.float32 or not N or np.abs(images).max() > 1:
        raise NanodiffError(
            f"images are {images.dtype} {images.shape}: must be float32 (N,H,W,C), N > 0, in [-1, 1]"
        )
    _need_int("batch", batch, 1, 2**31)
    if times is not None:
        _need_int("times", times, 1, max(1, T - 1))
    edges = np.linspace(1, T, (T - 1 if times is None else times) + 1).round().astype(int) if T > 1 else []
    strata = [(0, 1), *zip(edges, edges[1:])]  # low <= t < high
    totals, sums = np.zeros(N), np.zeros(len(strata))
    for first in range(0, N, batch):
        x0 = images[first : first + batch]
        told = None if labels is None else np.asarray(labels)[first : first + batch]
        predict, draw, _, frozen = _adapt(model, told, None)
        place = random_bits((len(x0), len(strata)), seed, 0, BOUND, first) / 2.0**32
        bits = diff.prior_bits(x0)
        with frozen:
            for i, (low, high) in enumerate(strata):
                t = low + (place[:, i] * (high - low)).astype(int)  # each image its own
                a, s = (w.reshape(-1, 1, 1, 1) for w in diff.scales(t))
                xt = a * x0 + s * draw(x0.shape, seed, int(low), BOUND, first)
                terms, _ = diff.bound(x0, xt, predict(xt, t), t, clip)
                bits += (high - low) * terms
                sums[i] += terms.sum()
                if tick:
                    tick()
        totals[first : first + len(x0)] = bits
    prior = float(diff.prior_bits(images).mean())
    error = float(totals.std(ddof=1) / math.sqrt(N)) if N > 1 else math.nan
    terms = [(int(low), float(x) / N, int(high - low)) for (low, high), x in zip(strata, sums)]
    return dict(total=float(totals.mean()), error=error, prior=prior, last=terms[0][1], terms=terms)
