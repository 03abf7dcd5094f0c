"""Multi-head attention on the CPU: a job does some heads of one image, with matrix products by the
micro-kernel or on the matrix unit (amx_cpu.py), behind the same three functions. Maths: attention_ref.py.

A job makes QUERIES rows of the scores at a time, in scratch memory that stays in the cache, so no (N, N)
array exists. Right-hand sides are first packed in the order in which the products read them.
"""

import numpy as np

from nanodiff.kernels.parallel_cpu import AMX, empty, njit, parallel, scratch
from nanodiff.kernels.random_cpu import log
from nanodiff.kernels.simd_cpu import PANEL, ROWS, ROWS_T, at, exp, exp_sum, largest, make_product

__all__ = ["attention_forward", "attention_backward"]

f32 = np.float32
FAST = {"contract", "reassoc"}  # sums along a row may be split over the lanes of a register: a fixed split
product, product_t = make_product(ROWS), make_product(ROWS_T, transposed=True)
if AMX:
    from nanodiff.kernels.amx_cpu import add_transposed, pack, times
    from nanodiff.kernels.tiles_cpu import begin, end

    UNIT, QUERIES = 32, 64  # sizes are rounded up to multiples of UNIT; rows of the scores made at a time
else:
    UNIT, QUERIES = PANEL, 4 * ROWS

    @njit
    def begin():
        pass

    end = begin

    @njit
    def pack(x, turned, out, spare):
        """x (N, K) as a right-hand side of `times`, in panels of 16 columns: for a @ x or, if turned, a @
        x^T."""
        N, K = x.shape
        if turned:
            for p in range(N // PANEL):
                for k in range(K):
                    for q in range(PANEL):
                        out[(p * K + k) * PANEL + q] = x[p * PANEL + q, k]
        else:
            for p in range(K // PANEL):
                for n in range(N):
                    for q in range(PANEL):
                        out[(p * N + n) * PANEL + q] = x[n, p * PANEL + q]

    @njit
    def times(a, depth, packed, out, steps, spare):
        """out (M, N) = a (M, K) @ what `packed` packs, of which the first `depth` of K count."""
        (M, K), N = a.shape, out.shape[1]
        for m in range(0, M, ROWS):
            for n in range(0, N, PANEL):
                product(at(a, m * K), K, at(packed, n * K), PANEL, at(out, m * N + n), N, depth, 0)

    @njit
    def add_transposed(a, b, n, out, steps, spare):
        """out (M, N) += a (K, M)^T @ b (K, N), of which the first n of K count."""
        M, N = out.shape
        for m in range(0, M, ROWS_T):
            for p in range(0, N, PANEL):
                product_t(at(a, m), M, at(b, p), N, at(out, m * N + p), N, n, 1)


@njit
def copy_rows(x, n0, n, scale, out):
    """out[:n, :D] = rows n0 .. n0 + n of x (N, D) times scale; zero below."""
    for i in range(n):
        row, to = x[n0 + i], out[i]
        for d in range(row.size):
            to[d] = row[d] * scale
    below = out[n:].reshape(-1)
    for i in range(below.size):
        below[i] = 0


@njit
def clear(a):
    for i in range(a.size):
        a[i] = 0


@parallel(flags=FAST)
def forward(job, worker, q, k, v, out, lse, heads, some, steps, scratch):
    _, N, C = q.shape
    D = C // heads
    NP, DP = (N + UNIT - 1) // UNIT * UNIT, (D + UNIT - 1) // UNIT * UNIT
    s = scratch[worker]
    keys, s = s[: NP * DP], s[NP * DP :]
    values, s = s[: NP * DP], s[NP * DP :]
    clear(s[: (NP + QUERIES) * DP])  # copies leave the columns beyond D as they are
    rows, s = s[: NP * DP].reshape(NP, DP), s[NP * DP :]
    queries, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    scores, s = s[: QUERIES * NP].reshape(QUERIES, NP), s[QUERIES * NP :]
    result, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    totals, spare = s[:QUERIES], s[QUERIES:]
    begin()
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    for h in range(first, min(first + some, heads)):
        columns = slice(h * D, (h + 1) * D)
        copy_rows(k[b, :, columns], 0, N, f32(1), rows)
        pack(rows, 1, keys, spare)
        copy_rows(v[b, :, columns], 0, N, f32(1), rows)
        pack(rows, 0, values, spare)
        for n0 in range(0, N, QUERIES):
            n = min(QUERIES, N - n0)
            copy_rows(q[b, :, columns], n0, n, f32(1 / np.sqrt(D)), queries)
            times(queries, D, keys, scores, steps, spare)
            for i in range(n):
                for j in range(N, NP):
                    scores[i, j] = -np.inf
                row = at(scores, i * NP)
                top = largest(row, NP, scores[i, 0])
                totals[i] = exp_sum(row, NP, top)
                lse[b, h, n0 + i] = top
            times(scores, N, values, result, steps, spare)
            for i in range(n):  # dividing D values here is dividing N scores there
                lse[b, h, n0 + i] += log(totals[i])
                share, to = f32(1) / totals[i], out[b, n0 + i, columns]
                for d in range(to.size):
                    to[d] = result[i, d] * share
    end()


@parallel(flags=FAST)
def backward(job, worker, dout, q, k, v, out, lse, dq, dk, dv, heads, some, steps, scratch):
    _, N, C = q.shape
    D = C // heads
    NP, DP = (N + UNIT - 1) // UNIT * UNIT, (D + UNIT - 1) // UNIT * UNIT
    scale = f32(1 / np.sqrt(D))
    s = scratch[worker]
    keys, s = s[: NP * DP], s[NP * DP :]
    values, s = s[: NP * DP], s[NP * DP :]
    key_rows, s = s[: NP * DP], s[NP * DP :]
    padded = s[: 2 * (NP + QUERIES) * DP]
    dkeys, s = s[: NP * DP].reshape(NP, DP), s[NP * DP :]
    dvalues, s = s[: NP * DP].reshape(NP, DP), s[NP * DP :]
    queries, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    douts, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    result, s = s[: QUERIES * DP].reshape(QUERIES, DP), s[QUERIES * DP :]
    p, s = s[: QUERIES * NP].reshape(QUERIES, NP), s[QUERIES * NP :]
    ds, spare = s[: QUERIES * NP].reshape(QUERIES, NP), s[QUERIES * NP :]
    begin()
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    for h in range(first, min(first + some, heads)):
        columns = slice(h * D, (h + 1) * D)
        clear(padded)  # copies leave the columns beyond D as they are
        copy_rows(v[b, :, columns], 0, N, f32(1), dkeys)
        pack(dkeys, 1, values, spare)
        copy_rows(k[b, :, columns], 0, N, f32(1), dkeys)
        pack(dkeys, 1, keys, spare)
        pack(dkeys, 0, key_rows, spare)
        clear(dkeys.reshape(-1))
        for n0 in range(0, N, QUERIES):
            n = min(QUERIES, N - n0)
            copy_rows(q[b, :, columns], n0, n, scale, queries)
            copy_rows(dout[b, :, columns], n0, n, f32(1), douts)
            times(queries, D, keys, p, steps, spare)
            times(douts, D, values, ds, steps, spare)  # dp
            for i in range(n):
                dot, made, log = f32(0), out[b, n0 + i, columns], lse[b, h, n0 + i]
                for d in range(made.size):
                    dot += douts[i, d] * made[d]
                prow, drow = p[i, :N], ds[i, :N]
                for j in range(prow.size):
                    e = exp(min(prow[j] - log, f32(0)))
                    prow[j] = e
                    drow[j] = e * (drow[j] - dot)
                for j in range(N, NP):
                    p[i, j] = ds[i, j] = 0
            if n < QUERIES:
                clear(p[n:].reshape(-1))
                clear(ds[n:].reshape(-1))
            add_transposed(p, douts, n, dvalues, steps, spare)
            add_transposed(ds, queries, n, dkeys, steps, spare)  # queries carry the scale
            times(ds, N, key_rows, result, steps, spare)
            for i in range(n):
                to = dq[b, n0 + i, columns]
                for d in range(to.size):
                    to[d] = result[i, d] * scale
        for i in range(N):
            to_k, to_v = dk[b, i, columns], dv[b, i, columns]
            for d in range(to_k.size):
                to_k[d] = dkeys[i, d]
                to_v[d] = dvalues[i, d]
    end()


def _sizes(N, D):
    """N and D rounded up, room for the operands of a product, and where a step of a sum begins in it."""
    NP, DP = (-(-n // UNIT) * UNIT for n in (N, D))
    spare = 512 + 32 * max(NP, DP) + QUERIES * (32 + DP)
    # heads that a job does, one after another: two threads that write into the same cache line wait for each
    # other
    some = max(1, 64 // D)
    return NP, DP, spare, some, np.arange(max(NP, DP) // 32 + 1, dtype=np.int64) * 1024


def attention_forward(q, k, v, heads):
    B, N, C = q.shape
    out, lse = empty(q.shape), empty((B, heads, N))
    NP, DP, spare, some, steps = _sizes(N, C // heads)
    room = scratch(3 * NP * DP + QUERIES * (2 * DP + NP + 1) + spare)
    forward(B * -(-heads // some), q, k, v, out, lse, heads, some, steps, room)
    return out, lse


def attention_backward(dout, q, k, v, out, lse, heads):
    B, N, C = q.shape
    dq, dk, dv = empty(q.shape), empty(q.shape), empty(q.shape)
    NP, DP, spare, some, steps = _sizes(N, C // heads)
    room = scratch(5 * NP * DP + QUERIES * (3 * DP + 2 * NP) + spare)
    backward(B * -(-heads // some), dout, q, k, v, out, lse, dq, dk, dv, heads, some, steps, room)
    return dq, dk, dv
