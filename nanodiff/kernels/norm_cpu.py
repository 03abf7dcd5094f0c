"""Group norm and SiLU on the CPU: two passes over x forward, two over x and dout backward. Maths:
norm_ref.py.

A job owns some whole groups of one image, narrow enough that its pixels are still in the cache at the second
pass. All loops run over channels, which lie side by side; sums over pixels are kept for each channel, in
float32, of values from which the channel's first pixel was subtracted, so that a large mean costs no digits
of the variance.
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, njit, parallel

__all__ = ["groupnorm_forward", "groupnorm_backward"]

f32 = np.float32
FAST = {"contract"}  # let multiply and add fuse; sums keep their order
CACHE = 128 * 1024  # floats of x that a job should not exceed


@njit(flags=FAST)
def exp(x):
    """exp(x), without branches or table so that the loop around it runs on SIMD registers.

    exp(x) = 2^n exp(r), n the nearest integer to x / ln 2: the exponent bits of 2^n are n + 127; exp(r) on
    |r| <= ln 2 / 2 is its Taylor series to r^6 (error 2e-7). x is held within +-87, where float32 ends.
    """
    x = min(max(x, f32(-87)), f32(87))
    n = np.floor(x * f32(1.44269504) + f32(0.5))
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)  # ln 2 in two parts: n times the first is exact
    p = f32(1 / 720) * r + f32(1 / 120)
    p = p * r + f32(1 / 24)
    p = p * r + f32(1 / 6)
    p = p * r + f32(0.5)
    p = p * r + f32(1)
    p = p * r + f32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(flags=FAST)
def sigmoid(z):
    return f32(1) / (f32(1) + exp(-z))


@parallel(flags=FAST)
def forward(job, worker, x, weight, bias, out, mean, rstd, eps, silu, blocks, scratch):
    """x (B, N, C): one image and one block of groups."""
    B, N, C = x.shape
    G = mean.shape[1]
    D = C // G
    b, block = job // blocks, job % blocks
    g0, g1 = block * G // blocks, (block + 1) * G // blocks
    c0, wide = g0 * D, (g1 - g0) * D
    first, s1, s2 = scratch[worker, 0, :wide], scratch[worker, 1, :wide], scratch[worker, 2, :wide]
    for c in range(wide):
        first[c] = x[b, 0, c0 + c]
        s1[c] = 0
        s2[c] = 0
    for i in range(N):
        row = x[b, i, c0 : c0 + wide]
        for c in range(wide):
            d = row[c] - first[c]
            s1[c] += d
            s2[c] += d * d
    for g in range(g1 - g0):
        total = 0.0
        for c in range(g * D, g * D + D):
            total += s1[c] + N * np.float64(first[c])
        m = total / (N * D)
        total = 0.0
        for c in range(g * D, g * D + D):  # sum (x - m)^2 from the sums of x - first
            shift = m - first[c]
            total += s2[c] - 2 * shift * s1[c] + N * shift * shift
        r = 1 / np.sqrt(max(total, 0.0) / (N * D) + eps)
        mean[b, g0 + g], rstd[b, g0 + g] = m, r
        for c in range(g * D, g * D + D):  # y = (x - mean) * scale + bias: subtract first, or digits are lost
            first[c] = m
            s1[c] = r * weight[c0 + c]
            s2[c] = bias[c0 + c]
    for i in range(N):
        row, to = x[b, i, c0 : c0 + wide], out[b, i, c0 : c0 + wide]
        if silu:
            for c in range(wide):
                y = (row[c] - first[c]) * s1[c] + s2[c]
                to[c] = y * sigmoid(y)
        else:
            for c in range(wide):
                to[c] = (row[c] - first[c]) * s1[c] + s2[c]


@parallel(flags=FAST)
def backward(job, worker, dout, x, mean, rstd, weight, bias, silu, residual, dx, dparams, blocks, scratch):
    """dparams (B, 2, C): each image's share of the gradients of weight and bias."""
    B, N, C = x.shape
    G = mean.shape[1]
    D = C // G
    b, block = job // blocks, job % blocks
    g0, g1 = block * G // blocks, (block + 1) * G // blocks
    c0, wide = g0 * D, (g1 - g0) * D
    centre, scale, shift = scratch[worker, 0, :wide], scratch[worker, 1, :wide], bias[c0 : c0 + wide]
    s1, s2 = scratch[worker, 2, :wide], scratch[worker, 3, :wide]
    for c in range(wide):
        g = g0 + c // D
        centre[c] = mean[b, g]
        scale[c] = rstd[b, g] * weight[c0 + c]
        s1[c] = 0
        s2[c] = 0
    for i in range(N):  # dy into dx; sums of dy and dy * (x - mean)
        row, drow, to = x[b, i, c0 : c0 + wide], dout[b, i, c0 : c0 + wide], dx[b, i, c0 : c0 + wide]
        if silu:
            for c in range(wide):
                d = row[c] - centre[c]
                y = d * scale[c] + shift[c]
                q = sigmoid(y)
                dy = drow[c] * q * (f32(1) + y * (f32(1) - q))
                to[c] = dy
                s1[c] += dy
                s2[c] += dy * d
        else:
            for c in range(wide):
                to[c] = drow[c]
                s1[c] += drow[c]
                s2[c] += drow[c] * (row[c] - centre[c])
    for g in range(g0, g1):
        r = np.float64(rstd[b, g])
        total, total_norm = 0.0, 0.0
        for c in range((g - g0) * D, (g - g0 + 1) * D):
            dnorm = s2[c] * r  # sum of dy * norm
            dparams[b, 0, c0 + c], dparams[b, 1, c0 + c] = dnorm, s1[c]
            total += s1[c] * weight[c0 + c]
            total_norm += dnorm * weight[c0 + c]
        # dx = rstd (dnorm - average - norm average_norm) = dy * scale + (x - mean) * s2 + s1
        for c in range((g - g0) * D, (g - g0 + 1) * D):
            s2[c] = -r * r * total_norm / (N * D)
            s1[c] = -r * total / (N * D)
    for i in range(N):
        row, to = x[b, i, c0 : c0 + wide], dx[b, i, c0 : c0 + wide]
        if residual.size:
            more = residual[b, i, c0 : c0 + wide]
            for c in range(wide):
                to[c] = to[c] * scale[c] + (row[c] - centre[c]) * s2[c] + s1[c] + more[c]
        else:
            for c in range(wide):
                to[c] = to[c] * scale[c] + (row[c] - centre[c]) * s2[c] + s1[c]


def _blocks(B, N, C, G):
    """Blocks of groups for each image: few enough that rows stay wide, enough for the cache and the
    threads."""
    wanted = max(-(-N * C // CACHE), -(-4 * parallel_cpu.threads() // B))
    return max(1, min(wanted, G, C // 32))


def groupnorm_forward(x, weight, bias, groups, eps, silu):
    B, C = x.shape[0], x.shape[-1]
    rows, out = x.reshape(B, -1, C), empty(x.shape)
    mean, rstd = empty((B, groups)), empty((B, groups))
    blocks = _blocks(B, rows.shape[1], C, groups)
    scratch = empty((parallel_cpu.threads(), 3, C))
    forward(
        B * blocks, rows, weight, bias, out.reshape(rows.shape), mean, rstd, eps, int(silu), blocks, scratch
    )
    return out, mean, rstd


def groupnorm_backward(dout, x, mean, rstd, weight, bias, groups, silu, dweight, dbias, residual=None):
    B, C = x.shape[0], x.shape[-1]
    rows, dx, dparams = x.reshape(B, -1, C), empty(x.shape), empty((B, 2, C))
    blocks = _blocks(B, rows.shape[1], C, groups)
    scratch = empty((parallel_cpu.threads(), 4, C))
    drows = dout.reshape(rows.shape)
    more = rows[:0] if residual is None else residual.reshape(rows.shape)
    backward(
        B * blocks, drows, rows, mean, rstd, weight, bias, int(silu), more, dx.reshape(rows.shape), dparams,
        blocks, scratch,
    )  # fmt: skip
    dweight += dparams[:, 0].sum(0)
    dbias += dparams[:, 1].sum(0)
    return dx
