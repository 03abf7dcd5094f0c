"""Multi-head attention on the CPU, on the micro-kernel of simd_cpu.py or, where heads are wide and there is a
matrix unit, by amx_attention_cpu.py. Maths: attention_ref.py.

A job does some heads of one image, and makes the scores of Q queries at a time, in scratch memory that stays
in the cache: no (N, N) array exists. They are scores[key, query], a query in each lane of a register: so a
softmax goes down the rows, and nothing is ever summed over lanes. The heads' W channels lie in
    rows    [tokens, WP]                zero beyond N and W
    turned  [tokens / 16, WP, 16]       the same in panels of 16 tokens, a token in each lane
"""

import functools

import numpy as np

from nanodiff.kernels import amx_attention_cpu as wide
from nanodiff.kernels.amx_attention_cpu import copy
from nanodiff.kernels.parallel_cpu import AMX, empty, njit, parallel, scratch, shared, threads
from nanodiff.kernels.random_cpu import log
from nanodiff.kernels.simd_cpu import (
    PANEL,
    ROWS_T,
    WIDE,
    at,
    larger,
    make_product,
    make_rows,
    shift,
    table_at,
)
from nanodiff.kernels.tiles_cpu import transpose16

__all__ = ["attention_forward", "attention_backward"]

f32 = np.float32
FAST = {"contract"}
QUERIES = 64  # of the scores made at a time
NARROW = 16 if AMX else 1 << 30  # channels of a head up to which the micro-kernel is faster
LANES, TALL = PANEL * WIDE, ROWS_T * WIDE  # queries of a product, and keys of one: as many registers
by_channels, by_queries = make_product(ROWS_T, panels=WIDE), make_product(TALL)
by_keys = make_product(ROWS_T, transposed=True, panels=WIDE)


def exp_and_sum(s, scale, less):
    e = (s * scale - less).exp()
    return e, e


pass_top = make_rows(lambda s: (s,), 1, 0, 1, output=0, combine=larger)
pass_exp = make_rows(exp_and_sum, 1, 2, 1)
pass_again = make_rows(lambda s, scale, less: exp_and_sum(s, scale, less)[:1], 1, 2, 0)
pass_share = make_rows(lambda o, share: (o * share,), 1, 1, 0)
pass_dot = make_rows(lambda o, do: (o * do,), 2, 0, 1, output=0)
pass_ds = make_rows(lambda p, dp, scale, dot: (p * (dp - dot) * scale,), 2, 2, 0)


@njit
def turn(s, rows, count, W, WP, turned):
    for n in range(0, count, 16):
        for c in range(0, W, 16):
            transpose16(at(s, rows + n * WP + c), WP, at(s, turned + n * WP + c * 16))


@njit
def save_turned(s, turned, block, WP, to, C, N, W):
    for n in range(0, N, 16):
        for c in range(0, W, 16):
            transpose16(at(s, turned + n * WP + c * 16), 16, at(s, block))
            rows, row = min(16, N - n), min(16, W - c)
            copy(at(s, block), 16, rows, row, shift(to, n * C + c), C, rows, row)


@njit
def sum_channels(s, rows, turned, N, D, WP, scores, Q, lanes):
    """scores [N, lanes] = rows [N, D] @ turned [D, lanes]."""
    for i in range(0, lanes, LANES):
        for j in range(0, N, ROWS_T):
            by_channels(
                at(s, rows + j * WP), WP, at(s, turned + i * WP), 16, at(s, scores + j * Q + i), Q, D, 0,
                16 * WP, 16,
            )  # fmt: skip


@njit
def sum_keys(s, rows, scores, N, D, WP, turned, Q, lanes):
    """turned [D, lanes] = rows [N, D]^T @ scores [N, lanes]."""
    for i in range(0, lanes, LANES):
        for d in range(0, D, ROWS_T):
            by_keys(
                at(s, rows + d), WP, at(s, scores + i), Q, at(s, turned + i * WP + d * 16), 16, N, 0,
                16, 16 * WP,
            )  # fmt: skip


@njit
def sum_queries(s, scores, rows, N, D, WP, out, E, Q, n, add):
    """out [N, D], rows of E floats, (+)= scores [N, n] @ rows [n, D]."""
    for j in range(0, N, TALL):
        for d in range(0, D, 16):
            to = shift(out, j * E + d)
            by_queries(at(s, scores + j * Q), Q, at(s, rows + d), WP, to, E, n, add)


@parallel(flags=FAST)
def forward(job, worker, q, k, v, out, lse, heads, some, Q, NP, WP, scratch, tables):
    _, N, C = q.shape
    D = C // heads
    scale = f32(1 / np.sqrt(D))
    s, table, size, block, S = scratch[worker], tables[worker], NP * WP, Q * WP, Q | 16
    scales, tops, totals, keys = s[:Q], s[Q : 2 * Q], s[2 * Q : 3 * Q], 3 * Q
    values, queries = keys + size, keys + 2 * size
    turned_q, scores = queries + block, queries + 2 * block
    table[0] = table[1] = s.ctypes.data + 4 * scores
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    c, last = first * D, min(first + some, heads)
    W = last * D - c
    copy(at(k, b * N * C + c), C, N, W, at(s, keys), WP, NP, WP)
    copy(at(v, b * N * C + c), C, N, W, at(s, values), WP, NP, WP)
    for n0 in range(0, N, Q):
        n, lanes = min(Q, N - n0), min(Q, NP - n0)
        copy(at(q, (b * N + n0) * C + c), C, n, W, at(s, queries), WP, lanes, WP)
        turn(s, queries, lanes, W, WP, turned_q)
        for h in range(first, last):
            d = h * D - c
            sum_channels(s, keys + d, turned_q + d * 16, N, D, WP, scores, S, lanes)
            for i in range(Q):
                scales[i], tops[i], totals[i] = scale, -np.inf, 0
            pass_top(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(tops, 0), Q)
            for i in range(Q):
                tops[i] *= scale
            pass_exp(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(totals, 0), Q)
            sum_keys(s, values + d, scores, N, D, WP, queries + d * 16, S, lanes)
            for i in range(n):  # `log` is a number even of NaN, the rest of the sum is not
                lse[b, h, n0 + i] = tops[i] + log(totals[i]) + f32(0) * totals[i]
            for i in range(Q):
                totals[i] = f32(1) / totals[i]  # dividing D values here is dividing N scores there
            for i in range(0, lanes, 16):
                table[2] = table[3] = s.ctypes.data + 4 * (queries + d * 16 + i * WP)
                pass_share(table_at(table, 2), 0, D, 16, 16, at(totals, i), at(totals, 0), Q)
        save_turned(s, queries, scores, WP, at(out, (b * N + n0) * C + c), C, n, W)


@parallel(flags=FAST)
def backward(job, worker, dout, q, k, v, out, lse, dq, dk, dv, heads, some, Q, NP, WP, E, scratch, tables):
    _, N, C = q.shape
    D = C // heads
    scale = f32(1 / np.sqrt(D))
    s, table, size, block, S = scratch[worker], tables[worker], NP * WP, Q * WP, Q | 16
    scales, less, dots, keys = s[:Q], s[Q : 2 * Q], s[2 * Q : (2 + some) * Q], (2 + some) * Q
    values, dkeys = keys + size, keys + 2 * size
    dvalues = dkeys + some * NP * E
    queries = dvalues + some * NP * E
    douts, turned_q, turned_d = queries + block, queries + 2 * block, queries + 3 * block
    result, p = queries + 4 * block, queries + 5 * block
    ds, room = p + NP * S, p + 2 * NP * S
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    c, last = first * D, min(first + some, heads)
    W = last * D - c
    copy(at(k, b * N * C + c), C, N, W, at(s, keys), WP, NP, WP)
    copy(at(v, b * N * C + c), C, N, W, at(s, values), WP, NP, WP)
    there = N % 32 == 0 and D % 32 == 0  # dk and dv are whole blocks
    for n0 in range(0, N, Q):
        n, lanes = min(Q, N - n0), min(Q, NP - n0)
        copy(at(out, (b * N + n0) * C + c), C, n, W, at(s, queries), WP, lanes, WP)
        turn(s, queries, lanes, W, WP, result)
        copy(at(q, (b * N + n0) * C + c), C, n, W, at(s, queries), WP, lanes, WP)
        turn(s, queries, lanes, W, WP, turned_q)
        copy(at(dout, (b * N + n0) * C + c), C, n, W, at(s, douts), WP, lanes, WP)
        turn(s, douts, lanes, W, WP, turned_d)
        for i in range(dots.size):
            dots[i] = 0
        for h in range(last - first):
            for i in range(0, lanes, 16):
                here = s.ctypes.data + 4 * (i * WP + h * D * 16)
                table[0], table[1] = here + 4 * result, here + 4 * turned_d
                pass_dot(table_at(table, 0), 0, D, 16, 16, at(dots, 0), at(dots, h * Q + i), Q)
        table[0] = table[1] = s.ctypes.data + 4 * p
        table[2] = table[3] = s.ctypes.data + 4 * ds
        for h in range(first, last):
            d = h * D - c
            to = (h - first) * NP * E
            of_k, of_v, row = at(s, dkeys + to), at(s, dvalues + to), E
            if there:
                of_k, of_v, row = at(dk, b * N * C + h * D), at(dv, b * N * C + h * D), C
            sum_channels(s, keys + d, turned_q + d * 16, N, D, WP, p, S, lanes)
            sum_channels(s, values + d, turned_d + d * 16, N, D, WP, ds, S, lanes)
            for i in range(Q):
                scales[i], less[i] = scale, 0
            for i in range(n):
                less[i] = lse[b, h, n0 + i]
            pass_again(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(scales, 0), Q)
            for i in range(Q):
                less[i] = dots[(h - first) * Q + i]
            pass_ds(table_at(table, 1), 0, N, S, lanes, at(scales, 0), at(scales, 0), Q)
            sum_keys(s, keys + d, ds, N, D, WP, result + d * 16, S, lanes)
            sum_queries(s, p, douts + d, N, D, WP, of_v, row, S, n, n0)
            sum_queries(s, ds, queries + d, N, D, WP, of_k, row, S, n, n0)
        save_turned(s, result, room, WP, at(dq, (b * N + n0) * C + c), C, n, W)
    for h in range(first, first if there else last):
        to = (h - first) * NP * E
        copy(at(s, dkeys + to), E, N, D, at(dk, b * N * C + h * D), C, N, D)
        copy(at(s, dvalues + to), E, N, D, at(dv, b * N * C + h * D), C, N, D)


@functools.lru_cache(maxsize=64)
def _sizes(N, D, heads):
    """Heads of a job, queries at a time, rows and their floats rounded up, floats of a row of dk."""
    NP = -(-N // 32) * 32
    # whole cache lines: two threads that write into the same one wait for each other
    some, E = min(heads, max(1, 64 // D)), -(-D // 16) * 16
    return some, min(QUERIES, NP), NP, -(-((some - 1) * D + E) // 16) * 16 | 16, E


def attention_forward(q, k, v, heads):
    B, N, C = q.shape
    out, lse = empty(q.shape), empty((B, heads, N))
    if C // heads > NARROW:
        wide.attention(wide.forward, lse, q, k, v, out)
        return out, lse
    some, Q, NP, WP, _ = _sizes(N, C // heads, heads)
    room, tables = (
        scratch((2 * NP + 2 * Q) * WP + NP * (Q + 16) + 3 * Q),
        shared("tables", (threads(), 4), np.int64),
    )
    forward(B * -(-heads // some), q, k, v, out, lse, heads, some, Q, NP, WP, room, tables)
    return out, lse


def attention_backward(dout, q, k, v, out, lse, heads):
    B, N, C = q.shape
    made = empty((3, *q.shape))
    dq, dk, dv = made
    if C // heads > NARROW:
        wide.attention(wide.backward, lse, dout, q, k, v, out, dq, dk, dv)
        return made
    some, Q, NP, WP, E = _sizes(N, C // heads, heads)
    room = scratch((2 * NP + 5 * Q) * WP + 2 * some * NP * E + 3 * NP * (Q + 16) + (2 + some) * Q)
    jobs, tables = B * -(-heads // some), shared("tables", (threads(), 4), np.int64)
    backward(jobs, dout, q, k, v, out, lse, dq, dk, dv, heads, some, Q, NP, WP, E, room, tables)
    return made
