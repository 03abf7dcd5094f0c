"""Numba rendition of random_ref.py: the same bits. `flags` stay empty here, so LLVM contracts nothing."""

import math

import numpy as np

from nanodiff.kernels.parallel_cpu import empty, njit, parallel
from nanodiff.kernels.random_ref import COS, LN2_HI, LN2_LO, LOG, MULTIPLIERS, SIN, SQRT_HALF, WEYL

__all__ = ["random_bits", "normal"]

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
M0, M1 = map(u64, MULTIPLIERS)
W0, W1 = map(u64, WEYL)
LOW, HALF = u64(0xFFFFFFFF), u64(32)
JOB = 2048  # counters


@njit
def log(u):
    """The natural logarithm of a positive float32; derivation: random_ref.py."""
    bits = i32(f32(u).view(i32) - SQRT_HALF)
    e = f32(bits >> i32(23))
    f = i32((bits & i32(0x7FFFFF)) + SQRT_HALF).view(f32) - f32(1)
    ff = f * f
    p = LOG[7]
    p = p * f + LOG[6]
    p = p * f + LOG[5]
    p = p * f + LOG[4]
    p = p * f + LOG[3]
    p = p * f + LOG[2]
    p = p * f + LOG[1]
    p = p * f + LOG[0]
    return f + (p * f * ff + e * LN2_LO - f32(0.5) * ff) + e * LN2_HI


@njit
def box_muller(w0, w1):
    u = f32(i32(w0 >> u32(1))) * f32(2.0**-31) + f32(2.0**-32)
    r = np.sqrt(f32(-2) * log(u))

    t = f32(i32(i32(u32(w1 << u32(2))) >> i32(2))) * f32(2.0**-29)
    quadrant = u32(w1 + u32(1 << 29)) >> u32(30)
    tt = t * t
    s = t * (((SIN[3] * tt + SIN[2]) * tt + SIN[1]) * tt + SIN[0])
    c = f32(1) + tt * (((COS[3] * tt + COS[2]) * tt + COS[1]) * tt + COS[0])
    odd = quadrant & u32(1)
    x, y = (s, c) if odd else (c, s)
    x = -x if (quadrant + u32(1)) & u32(2) else x
    y = -y if quadrant & u32(2) else y
    return f32(r * x).view(u32), f32(r * y).view(u32)


@njit
def philox(out, c0, c1, c2, c3, k0, k1, convert):  # out (n * 4,) uint32: the counters c0 .. c0 + n - 1
    """Words, or normals where `convert`, in one pass.

    The ten rounds stand here, in 64-bit types: in a function of one counter LLVM would pair the products up
    before it comes to see the loop over counters, which it would then not widen.
    """
    for k in range(len(out) // 4):
        a, b, c, d = u64(c0 + k) & LOW, c1, c2, c3
        r = u64(0)
        while r < u64(10):
            p0, p1 = M0 * a, M1 * c
            a, b = (p1 >> HALF) ^ b ^ (k0 + r * W0 & LOW), p1 & LOW
            c, d = (p0 >> HALF) ^ d ^ (k1 + r * W1 & LOW), p0 & LOW
            r += u64(1)
        w0, w1, w2, w3 = u32(a), u32(b), u32(c), u32(d)
        if convert:
            w0, w1 = box_muller(w0, w1)
            w2, w3 = box_muller(w2, w3)
        e = u64(4) * u64(k)  # unsigned: Numba then adds no test for a negative index
        out[e], out[e + u64(1)], out[e + u64(2)], out[e + u64(3)] = w0, w1, w2, w3


@parallel
def fill(job, worker, out, counters, k0, k1, first, step, purpose, convert):
    g, stop = job * JOB, min((job + 1) * JOB, len(out) // 4)
    while g < stop:  # the counters of one sample after those of another
        i, j = g // counters, g % counters
        n = min(counters - j, stop - g)
        sample = u64(first + i) & LOW
        philox(out[4 * g : 4 * (g + n)], j, sample, u64(step), u64(purpose), u64(k0), u64(k1), convert)
        g += n


def draw(shape, seed, step, purpose, first, convert):
    samples, size, low = shape[0], math.prod(shape[1:]), 0xFFFFFFFF
    counters = -(-size // 4)  # per sample
    out = empty((samples * counters * 4,), u32)
    jobs = -(-samples * counters // JOB)
    fill(jobs, out, counters, seed & low, seed >> 32 & low, first, step & low, purpose, convert)
    if size % 4 == 0:
        return out.reshape(shape)
    whole = empty(shape, u32)
    whole.reshape(samples, size)[:] = out.reshape(samples, 4 * counters)[:, :size]
    return whole


def random_bits(shape, seed, step, purpose, first=0):
    return draw(shape, seed, step, purpose, first, 0)


def normal(shape, seed, step, purpose, first=0):
    return draw(shape, seed, step, purpose, first, 1).view(f32)
