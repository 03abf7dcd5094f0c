"""Ops on one element at a time, and the loss, on the CPU: in chunks of a fixed size. Maths: pointwise_ref.py.

A chunk is a slice first: loops from 0 to the size of an array become SIMD loops, those over a range do not.

SiLU on its own, time and class embeddings see arrays of a few thousand floats here: their NumPy definition is
fast enough (as_defined). cast, gather_images and sample_step are there for the GPU.
"""

import functools
import math

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels import pointwise_ref as ref
from nanodiff.kernels.parallel_cpu import empty, host, parallel
from nanodiff.kernels.pointwise_ref import __all__ as OPS
from nanodiff.kernels.pointwise_ref import cast, gather_images, sample_step  # noqa: F401  (of this one too)
from nanodiff.kernels.random_cpu import random_bits
from nanodiff.kernels.random_ref import DROPOUT
from nanodiff.kernels.simd_cpu import at, choose, make_rows, sigmoid, table_at
from nanodiff.kernels.sums_cpu import zeros

__all__ = [*OPS]

CHUNK = 1 << 14


def as_defined(op):
    return functools.wraps(op)(lambda *args: host(op, *args))


time_embedding, embedding_forward = map(as_defined, (ref.time_embedding, ref.embedding_forward))
silu_forward, silu_backward = map(as_defined, (ref.activation_forward, ref.activation_backward))
weighted_mse_loss = as_defined(ref.mse_loss)  # of images, not of activations: small


def embedding_backward(dout, labels, dtable):
    host(lambda: ref.embedding_backward(dout, labels, dtable) or ())


def _chunks(n):
    return -(-n // CHUNK)


@parallel
def add_chunk(job, worker, a, b, out):
    here = slice(job * CHUNK, (job + 1) * CHUNK)
    x, y, to = a[here], b[here], out[here]
    for i in range(to.size):
        to[i] = x[i] + y[i]


def add(a, b):
    out = empty(a.shape)
    add_chunk(_chunks(a.size), a.reshape(-1), b.reshape(-1), out.reshape(-1))
    return out


@parallel
def affine_chunk(job, worker, x, a, b, out):
    here = slice(job * CHUNK, (job + 1) * CHUNK)
    v, to = x[here], out[here]
    for i in range(to.size):
        to[i] = v[i] * a + b


def affine(x, a, b):
    out = empty(x.shape)
    affine_chunk(_chunks(x.size), x.reshape(-1), np.float32(a), np.float32(b), out.reshape(-1))
    return out


# ---- activations: what each makes of y, and its slope there ----
def silu(y):
    s = sigmoid(y)
    return y * s, s * (1 + y * (1 - s))


def relu(y):
    return choose(-y, 0, y), choose(y, 1, 0)


def gelu(y):
    """The tail beyond |y| from Abramowitz & Stegun 7.1.26, within 1e-7."""
    t, density = 1 / (1 + choose(y, y, -y) * (0.3275911 / math.sqrt(2))), (y * y * -0.5).exp()
    tail = t * 0
    for c in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = (tail + 0.5 * c) * t
    below = choose(y, 1 - tail * density, tail * density)
    return y * below, below + y * density * (1 / math.sqrt(2 * math.pi))


def mish(y):
    """With n = e^y: tanh(log(1 + n)) = q / (q + 2), q = n (n + 2), and the slope follows. It is 1 past 20."""
    n = choose(20 - y, y, 20).exp()
    q = n * (n + 2)
    r = 1 / (q + 2)
    return y * (q * r), q * r + y * (4 * n * (n + 1) * r * r)


PIXELS = 32  # of a job


def _modulation(activation):
    """Kernels for one activation, compiled when it is first used: jobs of PIXELS rows of x (B, N, C).
    known (B, 2, C): 1 + scale, shift;  sums (B, chunks, 2, C): each job's share of demb."""

    def value(x, scale, shift):
        return (activation(x * scale + shift)[0],)

    def slope(x, dout, scale, shift):
        dy = dout * activation(x * scale + shift)[1]
        return dy * scale, dy * x, dy

    pass_value, pass_slope = make_rows(value, 1, 2, 0), make_rows(slope, 2, 2, 2)

    def forward(job, worker, x, known, out, tables):
        (N, C), jobs = x.shape[1:], -(-x.shape[1] // PIXELS)
        b, r = job // jobs, job % jobs * PIXELS
        tables[worker, 0] = x.ctypes.data + b * N * C * 4
        tables[worker, 1] = out.ctypes.data + b * N * C * 4
        constants = at(known, b * 2 * C)
        pass_value(table_at(tables, worker * 4), r, min(r + PIXELS, N), C, C, constants, constants, C)

    def backward(job, worker, dout, x, known, dx, sums, tables):
        (N, C), jobs = x.shape[1:], -(-x.shape[1] // PIXELS)
        b, r = job // jobs, job % jobs * PIXELS
        tables[worker, 0] = x.ctypes.data + b * N * C * 4
        tables[worker, 1] = dout.ctypes.data + b * N * C * 4
        tables[worker, 2] = dx.ctypes.data + b * N * C * 4
        table, constants, share = table_at(tables, worker * 4), at(known, b * 2 * C), at(sums, job * 2 * C)
        pass_slope(table, r, min(r + PIXELS, N), C, C, constants, share, C)

    for body in (forward, backward):  # names of their own in the cache
        body.__name__ = body.__qualname__ = f"{activation.__name__}_{body.__name__}"
    return parallel(forward), parallel(backward)


MODULATIONS = {activation.__name__: _modulation(activation) for activation in (silu, relu, gelu, mish)}


def _modulation_arguments(x, emb):
    B, C = x.shape[0], x.shape[-1]
    rows, known = x.reshape(B, -1, C), host(np.add, emb.reshape(B, 2, C), np.array([[1], [0]], np.float32))
    return rows, known, -(-rows.shape[1] // PIXELS), empty((parallel_cpu.threads(), 4), np.int64)


def modulate_forward(x, emb, kind):
    rows, known, chunks, tables = _modulation_arguments(x, emb)
    out = empty(rows.shape)
    MODULATIONS[kind][0](len(rows) * chunks, rows, known, out, tables)
    return out.reshape(x.shape)


def modulate_backward(dout, x, emb, kind):
    rows, known, chunks, tables = _modulation_arguments(x, emb)
    dx, sums = empty(rows.shape), zeros((len(rows), chunks, *known.shape[1:]))
    MODULATIONS[kind][1](len(rows) * chunks, dout.reshape(rows.shape), rows, known, dx, sums, tables)
    return dx.reshape(x.shape), host(sums.sum, 1).reshape(emb.shape)


def _unmodulated(x):  # x (1 + 0) + 0 is x
    return x.reshape(1, -1, 1, x.shape[-1]), np.zeros((1, 2 * x.shape[-1]), np.float32)


def activation_forward(x, kind):
    if kind == "silu":
        return silu_forward(x, kind)
    return modulate_forward(*_unmodulated(x), kind).reshape(x.shape)


def activation_backward(dout, x, kind):
    if kind == "silu":
        return silu_backward(dout, x, kind)
    image, zero = _unmodulated(x)
    return modulate_backward(dout.reshape(image.shape), image, zero, kind)[0].reshape(x.shape)


@parallel
def dropout_chunk(job, worker, x, bits, threshold, scale, out):
    here = slice(job * CHUNK, (job + 1) * CHUNK)
    v, bits, to = x[here], bits[here], out[here]
    for i in range(to.size):
        to[i] = v[i] * scale if bits[i] >= threshold else np.float32(0)


def dropout(x, rate, seed, step, site):
    bits, out = random_bits(x.shape, seed, step, DROPOUT + 256 * site), empty(x.shape)
    threshold, scale = np.uint32(min(round(rate * 2**32), 2**32 - 1)), np.float32(1 / (1 - rate))
    dropout_chunk(_chunks(x.size), x.reshape(-1), bits.reshape(-1), threshold, scale, out.reshape(-1))
    return out


KINDS = {"eps": 0, "x0": 1, "v": 2}


@parallel
def q_sample_one(job, worker, x0, eps, a, s, kind, xt, target):  # (B, n) each
    a, s = a[job], s[job]
    x, e, noised, wanted = x0[job], eps[job], xt[job], target[job]
    for i in range(x.size):
        noised[i] = a * x[i] + s * e[i]
        wanted[i] = e[i] if kind == 0 else x[i] if kind == 1 else a * e[i] - s * x[i]


def q_sample(x0, eps, a, s, prediction):
    B, (xt, target) = x0.shape[0], (empty(x0.shape) for _ in range(2))
    flat = (v.reshape(B, -1) for v in (x0, eps))
    a, s = (np.ascontiguousarray(c, np.float32) for c in (a, s))
    q_sample_one(B, *flat, a, s, KINDS[prediction], xt.reshape(B, -1), target.reshape(B, -1))
    return xt, target


@parallel
def mse_chunk(job, worker, pred, target, dpred, sums):
    total, scale, here = 0.0, np.float32(2 / pred.size), slice(job * CHUNK, (job + 1) * CHUNK)
    x, y, to = pred[here], target[here], dpred[here]
    for i in range(to.size):
        d = x[i] - y[i]
        to[i] = d * scale
        total += np.float64(d) * np.float64(d)
    sums[job] = total


def mse_loss(pred, target, weight=None):
    if weight is not None:
        return weighted_mse_loss(pred, target, weight)
    dpred, sums = empty(pred.shape), np.empty(_chunks(pred.size))
    mse_chunk(sums.size, pred.reshape(-1), target.reshape(-1), dpred.reshape(-1), sums)
    (loss,) = host(lambda: [np.array([sums.sum() / pred.size])])
    return loss, dpred
