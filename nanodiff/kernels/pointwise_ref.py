"""Ops on one element at a time, and the loss, in NumPy: the definition."""

import numpy as np

from nanodiff.kernels.random_ref import DROPOUT, random_bits

__all__ = [
    "add", "silu_forward", "silu_backward", "time_embedding", "embedding_forward", "embedding_backward",
    "dropout", "q_sample", "mse_loss",
]  # fmt: skip


def add(a, b):
    """a + b: a residual forward; backward, the two gradients of a value that was used twice."""
    return a + b


def sigmoid(x):
    """1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def silu_forward(x):
    """x * sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x * sigmoid(x)


def silu_backward(dout, x):
    """dx for out = x s, s = sigmoid(x).

    ds/dx = s (1 - s), so dout/dx = s + x s (1 - s):
        dx = dout * s * (1 + x * (1 - s))
    """
    s = sigmoid(x)
    return dout * s * (1 + x * (1 - s))


def time_embedding(t, dim, flip_sin_to_cos, freq_shift, dtype=np.float32):  # (B,) -> (B, dim)
    """Sinusoids of the time step at dim // 2 frequencies 10000^(-i / (dim // 2 - freq_shift)).

    [sin | cos], or [cos | sin] with flip_sin_to_cos; a zero column ends an odd dim. Angles in float64.
    DDPM (Ho et al. 2020): sin first, freq_shift 1. Improved DDPM and later: cos first, freq_shift 0.
    """
    half = dim // 2
    frequency = np.exp(-np.log(10000.0) * np.arange(half) / (half - freq_shift))
    angle = np.asarray(t, np.float64)[:, None] * frequency
    waves = [np.cos(angle), np.sin(angle)] if flip_sin_to_cos else [np.sin(angle), np.cos(angle)]
    return np.concatenate([*waves, np.zeros((len(angle), dim % 2))], 1).astype(dtype)


def embedding_forward(labels, table):  # (B,), (K, D) -> (B, D)
    """Row labels[b] of the table."""
    return table[labels]


def embedding_backward(dout, labels, dtable):
    """out[b] = table[labels[b]]: adds dout[b] into row labels[b] of dtable, in the order of b."""
    np.add.at(dtable, labels, dout)


def dropout(x, rate, seed, step, site):
    """x / (1 - rate) where kept, 0 where dropped; each element is dropped with probability `rate`.

    The mask comes from Philox (purpose DROPOUT, layer number `site`), not from memory: the backward is the
    same call on dout, since out = mask * x makes dx = mask * dout.
    """
    bits = random_bits(x.shape, seed, step, DROPOUT + 256 * site)
    keep = bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return np.where(keep, x * x.dtype.type(1 / (1 - rate)), x.dtype.type(0))


def q_sample(x0, eps, a, s, prediction):  # (B,...), (B,...), (B,), (B,) -> xt, target
    """A noised sample and what the network must say of it (Ho et al. 2020, eq. 4; v: Salimans & Ho 2022).

    xt = a x0 + s eps, a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t);
    target = eps, x0 or v = a eps - s x0, as `prediction` says.
    """
    shape = (-1, *[1] * (x0.ndim - 1))
    a, s = (np.asarray(c, x0.dtype).reshape(shape) for c in (a, s))
    xt = a * x0 + s * eps
    return xt, {"eps": eps.copy, "x0": x0.copy, "v": lambda: a * eps - s * x0}[prediction]()


def mse_loss(pred, target):  # -> loss float64 (1,), dpred
    """Mean squared error over all n elements, and its gradient.

    loss = sum (pred - target)^2 / n, so
        dpred = 2 (pred - target) / n
    """
    diff = pred - target
    return np.array([np.square(diff, dtype=np.float64).mean()]), diff * diff.dtype.type(2 / diff.size)
