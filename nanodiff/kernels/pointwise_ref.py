"""Ops on one element at a time, and the loss, in NumPy: the definition."""

import math

import numpy as np

from nanodiff.kernels.random_ref import DROPOUT, random_bits

__all__ = [
    "add", "affine", "activation_forward", "activation_backward", "modulate_forward", "modulate_backward",
    "time_embedding", "embedding_forward", "embedding_backward", "dropout", "q_sample", "mse_loss",
    "cast", "gather_images", "sample_step",
]  # fmt: skip


def add(a, b):
    """a + b: a residual forward; backward, the two gradients of a value that was used twice."""
    return a + b


def affine(x, a, b):
    """a x + b for numbers a, b. dx = affine(dout, a, 0)."""
    return x * x.dtype.type(a) + x.dtype.type(b)


def sigmoid(x):
    """1 / (1 + exp(-x)), written with tanh, which does not overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _normal_cdf(x):
    return (0.5 + 0.5 * _erf(x / math.sqrt(2))).astype(x.dtype)


def activation_forward(x, kind):
    """What `kind` makes of every x:

    "silu"  x sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118)
    "relu"  x or 0, whichever is larger
    "gelu"  x P(x), P the probability that a normal number is below x (Hendrycks & Gimpel, arXiv:1606.08415)
    "mish"  x tanh(log(1 + e^x)) (Misra 2019, arXiv:1908.08681)
    """
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "relu":
        return np.maximum(x, 0)
    return x * (_normal_cdf(x) if kind == "gelu" else np.tanh(np.logaddexp(0, x)))


def activation_backward(dout, x, kind):
    """dx for the forward above: dout * (its slope at x), by the product rule.

    silu: out = x s, s = sigmoid(x). ds/dx = s (1 - s), so the slope is s + x s (1 - s) = s (1 + x (1 - s))
    relu: 1 where x > 0, else 0 (at 0 too, where there is none)
    gelu: out = x P. P is the integral of the normal density p, so the slope is
          P + x p,  p = exp(-x^2 / 2) / sqrt(2 pi)
    mish: out = x h, h = tanh(y), y = log(1 + e^x). dh/dy = 1 - h^2 and dy/dx = e^x / (1 + e^x) = sigmoid(x),
          so the slope is h + x (1 - h^2) sigmoid(x)
    """
    if kind == "silu":
        s = sigmoid(x)
        return dout * s * (1 + x * (1 - s))
    if kind == "relu":
        return np.where(x > 0, dout, x.dtype.type(0))
    if kind == "gelu":
        return dout * (_normal_cdf(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
    h = np.tanh(np.logaddexp(0, x))
    return dout * (h + x * (1 - h * h) * sigmoid(x))


def _modulated(x, emb):
    scale, shift = np.split(emb[:, None, None], 2, -1)
    return x * (1 + scale) + shift, 1 + scale


def modulate_forward(x, emb, kind):  # (B,H,W,C), (B,2C) -> (B,H,W,C)
    """activation(x (1 + scale) + shift), emb = [scale | shift]: what an embedding says to the channels of its
    image where it is not simply added (Dhariwal & Nichol 2021, arXiv:2105.05233, "adaptive group norm").
    """
    return activation_forward(_modulated(x, emb)[0], kind)


def modulate_backward(dout, x, emb, kind):  # -> dx (B,H,W,C), demb (B,2C)
    """dx and demb for out = activation(y), y = x (1 + scale) + shift.

    dy comes from the activation's backward. y is linear in all three, and every pixel (h, w) of an image has
    the same scale and shift:
        dx = dy (1 + scale),   dscale = sum_(h,w) dy x,   dshift = sum_(h,w) dy
    """
    y, scale = _modulated(x, emb)
    dy = activation_backward(dout, y, kind)
    return dy * scale, np.concatenate([(dy * x).sum((1, 2)), dy.sum((1, 2))], -1)


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


def mse_loss(pred, target, weight=None):  # (B,...), (B,...), (B,) -> loss float64 (1,), dpred
    """Mean over all n elements of the squared error, each sample's times its weight, and its gradient.

    loss = sum_b weight_b sum (pred_b - target_b)^2 / n, so
        dpred_b = 2 weight_b (pred_b - target_b) / n
    """
    diff = pred - target
    w = diff.dtype.type(1) if weight is None else weight.reshape(-1, *[1] * (diff.ndim - 1))
    loss = np.array([(w * np.square(diff, dtype=np.float64)).mean()])
    return loss, w * diff * diff.dtype.type(2 / diff.size)


def cast(x, dtype):
    """x in another dtype, by name: "float32", "float64"; on the GPU also "bfloat16" (to nearest even)."""
    return x.astype(dtype, copy=False)


def gather_images(images, chosen, mirrored):  # uint8 (N,H,W,C), ints (B,), 0 or 1 (B,) -> float32 (B,H,W,C)
    """images[chosen], turned left to right where `mirrored`, from 0 .. 255 to [-1, 1]."""
    x = images[chosen]
    x = np.where(mirrored.astype(bool)[:, None, None, None], x[:, :, ::-1], x)
    return x / np.float32(127.5) - np.float32(1)


def sample_step(x, pred, z, c, limit):  # three times (B,...), (5,) -> x of the next step, x0
    """One step of a sampler, c = [wx, wp, w0, w, sigma]: x0 = wx x + wp pred, held in [-limit, limit] unless
    limit is 0 (NaN stays NaN); the next x = w0 x0 + w x + sigma z.
    """
    wx, wp, w0, w, sigma = c
    x0 = wx * x + wp * pred
    x0 = x0.clip(-limit, limit) if limit else x0
    return w0 * x0 + w * x + sigma * z, x0
