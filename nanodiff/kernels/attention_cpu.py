"""Multi-head attention on the CPU: one job per image and head, on the matrix micro-kernel. Maths:
attention_ref.py.

A job makes QUERIES rows of the scores at a time, in scratch memory that stays in the cache, so no (N, N)
array exists. Keys and values are first packed in the panels of 16 columns that the micro-kernel reads.
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, njit, parallel
from nanodiff.kernels.random_cpu import log
from nanodiff.kernels.simd_cpu import PANEL, ROWS, ROWS_T, at, exp, exp_sum, largest, make_product

__all__ = ["attention_forward", "attention_backward"]

f32 = np.float32
FAST = {"contract", "reassoc"}  # sums along a row may be split over the lanes of a register: a fixed split
QUERIES = 4 * ROWS
product, product_t = make_product(ROWS), make_product(ROWS_T, transposed=True)


@njit
def pack_columns(x, D, out):
    """Panels of columns of x (N, D): out[d // 16, n, d % 16], zero beyond D."""
    N = x.shape[0]
    for p in range(out.shape[0]):
        wide = min(PANEL, D - p * PANEL)
        for n in range(N):
            for q in range(wide):
                out[p, n, q] = x[n, p * PANEL + q]
            for q in range(wide, PANEL):
                out[p, n, q] = 0


@njit
def pack_rows(x, D, out):
    """Panels of rows of x (N, D), transposed: out[n // 16, d, n % 16], zero beyond N."""
    N = x.shape[0]
    for p in range(out.shape[0]):
        tall = min(PANEL, N - p * PANEL)
        for d in range(D):
            for q in range(tall):
                out[p, d, q] = x[p * PANEL + q, d]
            for q in range(tall, PANEL):
                out[p, d, q] = 0


@njit
def copy_rows(x, n0, n, scale, out):
    """out[:n] = rows n0 .. n0 + n of x times scale; zero below and to the right."""
    D = x.shape[1]
    for i in range(out.shape[0]):
        if i < n:
            for d in range(D):
                out[i, d] = x[n0 + i, d] * scale
            for d in range(D, out.shape[1]):
                out[i, d] = 0
        else:
            for d in range(out.shape[1]):
                out[i, d] = 0


@njit
def times_panels(a, panels, out):
    """out = a @ what `panels` (P, depth, 16) packs; a (rows, >= depth), out (rows, P * 16); rows in whole
    ROWS."""
    P, depth, _ = panels.shape
    lda, ldo = a.shape[1], out.shape[1]
    for r in range(0, a.shape[0], ROWS):
        for p in range(P):
            product(
                at(a, r * lda),
                lda,
                at(panels, p * depth * PANEL),
                PANEL,
                at(out, r * ldo + p * PANEL),
                ldo,
                depth,
                0,
            )


@njit
def add_transposed(a, b, n, out):
    """out (M, K) += a[:n]^T b[:n]; a (rows, M), b (rows, K), M in whole ROWS_T, K in whole panels."""
    M, K = out.shape
    for m in range(0, M, ROWS_T):
        for p in range(0, K, PANEL):
            product_t(at(a, m), M, at(b, p), K, at(out, m * K + p), K, n, 1)


@parallel(flags=FAST)
def forward(job, worker, q, k, v, out, lse, heads, scratch):
    _, N, C = q.shape
    D = C // heads
    Np, Dp = (N + PANEL - 1) // PANEL, (D + PANEL - 1) // PANEL
    NP = Np * PANEL
    b, h = job // heads, job % heads
    columns = slice(h * D, (h + 1) * D)
    s = scratch[worker]
    keys, s = s[: Np * D * PANEL].reshape(Np, D, PANEL), s[Np * D * PANEL :]
    values, s = s[: Dp * N * PANEL].reshape(Dp, N, PANEL), s[Dp * N * PANEL :]
    queries, s = s[: QUERIES * D].reshape(QUERIES, D), s[QUERIES * D :]
    scores, s = s[: QUERIES * NP].reshape(QUERIES, NP), s[QUERIES * NP :]
    result, totals = s[: QUERIES * Dp * PANEL].reshape(QUERIES, Dp * PANEL), s[QUERIES * Dp * PANEL :]
    pack_rows(k[b, :, columns], D, keys)
    pack_columns(v[b, :, columns], D, values)
    for n0 in range(0, N, QUERIES):
        n = min(QUERIES, N - n0)
        copy_rows(q[b, :, columns], n0, n, f32(1 / np.sqrt(D)), queries)
        times_panels(queries, keys, scores)
        for i in range(n):
            for j in range(N, NP):
                scores[i, j] = -np.inf
            row = at(scores, i * NP)
            top = largest(row, NP, scores[i, 0])
            totals[i] = exp_sum(row, NP, top)
            lse[b, h, n0 + i] = top
        times_panels(scores, values, result)
        for i in range(n):  # dividing D values here is dividing N scores there
            lse[b, h, n0 + i] += log(totals[i])
            share = f32(1) / totals[i]
            for d in range(D):
                out[b, n0 + i, h * D + d] = result[i, d] * share


@parallel(flags=FAST)
def backward(job, worker, dout, q, k, v, out, lse, dq, dk, dv, heads, scratch):
    _, N, C = q.shape
    D = C // heads
    Np, Dp = (N + PANEL - 1) // PANEL, (D + PANEL - 1) // PANEL
    NP, DP = Np * PANEL, Dp * PANEL
    b, h = job // heads, job % heads
    columns = slice(h * D, (h + 1) * D)
    scale = f32(1 / np.sqrt(D))
    s = scratch[worker]
    keys, s = s[: NP * D].reshape(Np, D, PANEL), s[NP * D :]
    values, s = s[: NP * D].reshape(Np, D, PANEL), s[NP * D :]
    key_rows, s = s[: DP * N].reshape(Dp, N, PANEL), s[DP * N :]
    dkeys, s = s[: NP * DP].reshape(NP, DP), s[NP * DP :]
    dvalues, s = s[: NP * DP].reshape(NP, DP), s[NP * DP :]
    queries, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    douts, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    result, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    p, s = s[: QUERIES * NP].reshape(QUERIES, NP), s[QUERIES * NP :]
    ds = s[: QUERIES * NP].reshape(QUERIES, NP)
    pack_rows(k[b, :, columns], D, keys)
    pack_rows(v[b, :, columns], D, values)
    pack_columns(k[b, :, columns], D, key_rows)
    dkeys[:, :] = 0
    dvalues[:, :] = 0
    for n0 in range(0, N, QUERIES):
        n = min(QUERIES, N - n0)
        copy_rows(q[b, :, columns], n0, n, scale, queries)
        copy_rows(dout[b, :, columns], n0, n, f32(1), douts)
        times_panels(queries, keys, p)
        times_panels(douts, values, ds)  # dp
        for i in range(n):
            dot = f32(0)
            for d in range(D):
                dot += douts[i, d] * out[b, n0 + i, h * D + d]
            prow, drow, log = p[i], ds[i], lse[b, h, n0 + i]
            for j in range(N):
                e = exp(min(prow[j] - log, f32(0)))
                prow[j] = e
                drow[j] = e * (drow[j] - dot)
            for j in range(N, NP):
                prow[j] = 0
                drow[j] = 0
        add_transposed(p, douts, n, dvalues)
        add_transposed(ds, queries, n, dkeys)  # queries carry the scale
        times_panels(ds, key_rows, result)
        for i in range(n):
            for d in range(D):
                dq[b, n0 + i, h * D + d] = result[i, d] * scale
    for i in range(N):
        for d in range(D):
            dk[b, i, h * D + d] = dkeys[i, d]
            dv[b, i, h * D + d] = dvalues[i, d]


def attention_forward(q, k, v, heads):
    B, N, C = q.shape
    out, lse = empty(q.shape), empty((B, heads, N))
    NP, DP = (-(-n // PANEL) * PANEL for n in (N, C // heads))
    scratch = empty((parallel_cpu.threads(), 2 * NP * DP + QUERIES * (2 * DP + NP + 1)))
    forward(B * heads, q, k, v, out, lse, heads, scratch)
    return out, lse


def attention_backward(dout, q, k, v, out, lse, heads):
    B, N, C = q.shape
    dq, dk, dv = empty(q.shape), empty(q.shape), empty(q.shape)
    NP, DP = (-(-n // PANEL) * PANEL for n in (N, C // heads))
    scratch = empty((parallel_cpu.threads(), 5 * NP * DP + QUERIES * (3 * DP + 2 * NP)))
    backward(B * heads, dout, q, k, v, out, lse, dq, dk, dv, heads, scratch)
    return dq, dk, dv
