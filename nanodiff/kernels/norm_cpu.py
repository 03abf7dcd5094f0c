"""Group norm and SiLU on the CPU: two passes over x forward, two over x and dout backward. Maths:
norm_ref.py.

A job owns some whole groups of one image, narrow enough that its pixels are still in the cache at the second
pass. A pass goes down the pixels with some channels at a time (simd_cpu.make_rows), whose constants and sums
stay in registers. Sums are in float32, of values from which the channel's first pixel was subtracted, so that
a large mean costs no digits of the variance.
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, parallel, shared
from nanodiff.kernels.simd_cpu import at, make_rows, sigmoid, table_at
from nanodiff.kernels.sums_cpu import add_columns

__all__ = ["groupnorm_forward", "groupnorm_again", "groupnorm_backward"]

f32 = np.float32
ROWS = 16  # pixels that a pass takes at a time, so that it reads them in the order of memory


# ---- one element: what passes over the rows compute ----
def spread(x, first):
    d = x - first
    return d, d * d


def affine(x, centre, scale, shift):
    return ((x - centre) * scale + shift,)


def affine_silu(x, centre, scale, shift):
    y = (x - centre) * scale + shift
    return (y * sigmoid(y),)


def slopes(x, dout, centre, scale, shift):  # silu' = q (1 + y (1 - q)), q = sigmoid(y)
    d = x - centre
    return dout, dout * d


def slopes_silu(x, dout, centre, scale, shift):
    d = x - centre
    y = d * scale + shift
    q = sigmoid(y)
    dy = dout * q * (1 + y * (1 - q))
    return dy, dy, dy * d


def gradient(x, dy, centre, scale, s1, s2):
    return (dy * scale + (x - centre) * s2 + s1,)


def gradient_plus(x, dy, more, centre, scale, s1, s2):
    return (dy * scale + (x - centre) * s2 + s1 + more,)


pass_stats = make_rows(spread, 1, 1, 2, output=False)
pass_affine, pass_silu = make_rows(affine, 1, 3, 0), make_rows(affine_silu, 1, 3, 0)
pass_slopes, pass_slopes_silu = make_rows(slopes, 2, 3, 2, output=False), make_rows(slopes_silu, 2, 3, 2)
pass_gradient, pass_gradient_plus = make_rows(gradient, 2, 4, 0), make_rows(gradient_plus, 3, 4, 0)


@parallel
def forward(job, worker, x, weight, bias, out, mean, rstd, eps, silu, blocks, scratch, tables):
    """x (B, N, C): one image and one block of groups."""
    B, N, C = x.shape
    G = mean.shape[1]
    D = C // G
    b, block = job // blocks, job % blocks
    g0, g1 = block * G // blocks, (block + 1) * G // blocks
    c0, wide = g0 * D, (g1 - g0) * D
    k, s = scratch[worker, :3], scratch[worker, 3:]
    start = (b * N * C + c0) * 4
    tables[worker, 0] = x.ctypes.data + start
    tables[worker, 1] = out.ctypes.data + start
    for c in range(wide):
        k[0, c] = x[b, 0, c0 + c]
        s[0, c] = s[1, c] = 0
    table, constants, ld = table_at(tables, worker * 4), at(scratch, worker * 5 * C), C
    for r in range(0, N, ROWS):
        pass_stats(table, r, min(r + ROWS, N), C, wide, constants, at(scratch, (worker * 5 + 3) * C), ld)
    for g in range(g1 - g0):
        total = 0.0
        for c in range(g * D, g * D + D):
            total += s[0, c] + N * np.float64(k[0, c])
        m = total / (N * D)
        total = 0.0
        for c in range(g * D, g * D + D):  # sum (x - m)^2 from the sums of x - first
            shift = m - k[0, c]
            total += s[1, c] - 2 * shift * s[0, c] + N * shift * shift
        r = 1 / np.sqrt(max(total, 0.0) / (N * D) + eps)
        mean[b, g0 + g], rstd[b, g0 + g] = m, r
        for c in range(g * D, g * D + D):  # y = (x - mean) * scale + bias: subtract first, or digits are lost
            k[0, c] = m
            k[1, c] = r * weight[c0 + c]
            k[2, c] = bias[c0 + c]
    if silu:
        for r in range(0, N, ROWS):
            pass_silu(table, r, min(r + ROWS, N), C, wide, constants, constants, ld)
    else:
        for r in range(0, N, ROWS):
            pass_affine(table, r, min(r + ROWS, N), C, wide, constants, constants, ld)


@parallel
def again(job, worker, x, mean, rstd, weight, bias, out, silu, scratch, tables):
    """The second half of `forward`: one image."""
    (_, N, C), G = x.shape, mean.shape[1]
    for c in range(C):
        g = c // (C // G)
        scratch[worker, 0, c] = mean[job, g]
        scratch[worker, 1, c] = rstd[job, g] * weight[c]
        scratch[worker, 2, c] = bias[c]
    tables[worker, 0] = x.ctypes.data + job * N * C * 4
    tables[worker, 1] = out.ctypes.data + job * N * C * 4
    table, constants = table_at(tables, worker * 4), at(scratch, worker * 3 * C)
    for r in range(0, N, ROWS):
        if silu:
            pass_silu(table, r, min(r + ROWS, N), C, C, constants, constants, C)
        else:
            pass_affine(table, r, min(r + ROWS, N), C, C, constants, constants, C)


@parallel
def backward(
    job, worker, dout, x, mean, rstd, weight, bias, silu, residual, dx, dparams, blocks, scratch, tables
):
    """dparams (B, 2, C): each image's share of the gradients of weight and bias."""
    B, N, C = x.shape
    G = mean.shape[1]
    D = C // G
    b, block = job // blocks, job % blocks
    g0, g1 = block * G // blocks, (block + 1) * G // blocks
    c0, wide = g0 * D, (g1 - g0) * D
    k, s = scratch[worker, :4], scratch[worker, 4:]
    start = (b * N * C + c0) * 4
    tables[worker, 0] = x.ctypes.data + start
    tables[worker, 1] = dout.ctypes.data + start
    tables[worker, 2] = tables[worker, 3] = dx.ctypes.data + start
    for c in range(wide):
        g = g0 + c // D
        k[0, c] = mean[b, g]
        k[1, c] = rstd[b, g] * weight[c0 + c]
        k[2, c] = bias[c0 + c]
        s[0, c] = s[1, c] = 0
    table, constants, ld = table_at(tables, worker * 4), at(scratch, worker * 6 * C), C
    sums = at(scratch, (worker * 6 + 4) * C)
    if silu:  # dy goes into dx
        for r in range(0, N, ROWS):
            pass_slopes_silu(table, r, min(r + ROWS, N), C, wide, constants, sums, ld)
        tables[worker, 1] = dx.ctypes.data + start
    else:
        for r in range(0, N, ROWS):
            pass_slopes(table, r, min(r + ROWS, N), C, wide, constants, sums, ld)
    for g in range(g0, g1):
        r = np.float64(rstd[b, g])
        total, total_norm = 0.0, 0.0
        for c in range((g - g0) * D, (g - g0 + 1) * D):
            dnorm = s[1, c] * r  # sum of dy * norm
            dparams[b, 0, c0 + c], dparams[b, 1, c0 + c] = dnorm, s[0, c]
            total += s[0, c] * weight[c0 + c]
            total_norm += dnorm * weight[c0 + c]
        # dx = rstd (dnorm - average - norm average_norm) = dy * scale + (x - mean) * s2 + s1
        for c in range((g - g0) * D, (g - g0 + 1) * D):
            k[2, c] = -r * total / (N * D)
            k[3, c] = -r * r * total_norm / (N * D)
    if residual.size:
        tables[worker, 2] = residual.ctypes.data + start
        for r in range(0, N, ROWS):
            pass_gradient_plus(table, r, min(r + ROWS, N), C, wide, constants, constants, ld)
    else:
        for r in range(0, N, ROWS):
            pass_gradient(table, r, min(r + ROWS, N), C, wide, constants, constants, ld)


def _blocks(B, C, G):
    """Blocks of groups for each image: enough for the threads, and few, so that rows stay wide."""
    return max(1, min(-(-4 * parallel_cpu.threads() // B), G, C // 32))


def _room(n, C):
    """For each worker n rows of C floats, and a table of 4 addresses."""
    threads = parallel_cpu.threads()
    return shared("rows", (threads, n, C)), shared("tables", (threads, 4), np.int64)


def groupnorm_forward(x, weight, bias, groups, eps, silu):
    B, C = x.shape[0], x.shape[-1]
    rows, out = x.reshape(B, -1, C), empty(x.shape)
    mean, rstd = empty((B, groups)), empty((B, groups))
    blocks = _blocks(B, C, groups)
    scratch, tables = _room(5, C)
    forward(
        B * blocks, rows, weight, bias, out.reshape(rows.shape), mean, rstd, eps, int(silu), blocks, scratch,
        tables,
    )  # fmt: skip
    return out, mean, rstd


def groupnorm_again(x, mean, rstd, weight, bias, groups, silu):
    B, C = x.shape[0], x.shape[-1]
    rows, out = x.reshape(B, -1, C), empty(x.shape)
    scratch, tables = _room(3, C)
    again(B, rows, mean, rstd, weight, bias, out.reshape(rows.shape), int(silu), scratch, tables)
    return out


def groupnorm_backward(dout, x, mean, rstd, weight, bias, groups, silu, dweight, dbias, residual=None):
    B, C = x.shape[0], x.shape[-1]
    rows, dx, dparams = x.reshape(B, -1, C), empty(x.shape), shared("dparams", (B, 2, C))
    blocks = _blocks(B, C, groups)
    scratch, tables = _room(6, C)
    drows = dout.reshape(rows.shape)
    more = rows[:0] if residual is None else residual.reshape(rows.shape)
    backward(
        B * blocks, drows, rows, mean, rstd, weight, bias, int(silu), more, dx.reshape(rows.shape), dparams,
        blocks, scratch, tables,
    )  # fmt: skip
    add_columns(dparams.reshape(B, -1), dweight)
    add_columns(dparams.reshape(B, -1), dbias, first=C)
    return dx
