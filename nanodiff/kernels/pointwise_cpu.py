"""Ops on one element at a time, and the loss, on the CPU: in chunks of a fixed size. Maths: pointwise_ref.py.

A chunk is a slice first: loops from 0 to the size of an array become SIMD loops, those over a range do not.

SiLU, time and class embeddings see arrays of a few thousand floats here: their NumPy definition is fast
enough.
"""

import numpy as np

from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.pointwise_ref import __all__ as OPS
from nanodiff.kernels.pointwise_ref import (  # noqa: F401  (ops of this rendition too)
    embedding_backward,
    embedding_forward,
    silu_backward,
    silu_forward,
    time_embedding,
)
from nanodiff.kernels.random_cpu import random_bits
from nanodiff.kernels.random_ref import DROPOUT

__all__ = [*OPS]

CHUNK = 1 << 14


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


def mse_loss(pred, target):
    dpred, sums = empty(pred.shape), np.empty(_chunks(pred.size))
    mse_chunk(sums.size, pred.reshape(-1), target.reshape(-1), dpred.reshape(-1), sums)
    return np.array([sums.sum() / pred.size]), dpred
