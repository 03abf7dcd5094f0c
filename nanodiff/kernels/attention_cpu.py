"""Multi-head attention on the CPU, on the micro-kernel of simd_cpu.py or, where heads are wide and there is
one, on the matrix unit of tiles_cpu.py. Maths: attention_ref.py.

A job does some heads of one image, and makes the scores of Q queries at a time, in scratch memory that stays
in the cache: no (N, N) array exists. They are scores[key, query], a query in each lane of a register: so a
softmax goes down the rows, and nothing is ever summed over lanes. The heads' W channels lie in
    rows    [tokens, WP]                zero beyond N and W
    turned  [tokens / 16, WP, 16]       the same in panels of 16 tokens, a token in each lane
The matrix unit wants values split into words of two bfloat16, hi and lo: `split` puts them where the values
were. Argument `steps` says where in its left operand each step of a sum begins; None means the micro-kernel:
Numba compiles a version of every function for each.
"""

import functools

import numpy as np

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
from nanodiff.kernels.tiles_cpu import begin, end, split_pair, tile_product, transpose16

__all__ = ["attention_forward", "attention_backward"]

f32, ZERO = np.float32, np.zeros(16, np.float32)
FAST = {"contract"}
QUERIES = 64  # of the scores made at a time
NARROW = 16 if AMX else 1 << 30  # channels of a head up to which the micro-kernel is faster
LANES, TALL = PANEL * WIDE, ROWS_T * WIDE  # queries of a product, and keys of one: as many registers
by_channels, by_queries = make_product(ROWS_T, panels=WIDE), make_product(TALL)
by_keys = make_product(ROWS_T, transposed=True, panels=WIDE)


def exp_and_sum(s, scale, less):
    e = (s * scale - less).exp()
    return e, e


pass_top = make_rows(lambda s: (s,), 1, 0, 1, output=False, combine=larger)
pass_exp = make_rows(exp_and_sum, 1, 2, 1)
pass_again = make_rows(lambda s, scale, less: exp_and_sum(s, scale, less)[:1], 1, 2, 0)
pass_share = make_rows(lambda o, share: (o * share,), 1, 1, 0)
pass_dot = make_rows(lambda o, do: (o * do,), 2, 0, 1, output=False)
pass_ds = make_rows(lambda p, dp, scale, dot: (p * (dp - dot) * scale,), 2, 2, 0)


@njit
def load(x, s, rows, count, WP):
    """x (tokens, W) to rows, of which there are `count`."""
    for n in range(x.shape[0]):
        row, to = x[n], s[rows + n * WP : rows + n * WP + WP]
        for i in range(row.size):
            to[i] = row[i]
        for i in range(row.size, to.size):
            to[i] = 0
    below = s[rows + x.shape[0] * WP : rows + count * WP]
    for i in range(below.size):
        below[i] = 0


@njit
def save(s, rows, WP, x):
    for n in range(x.shape[0]):
        row, to = s[rows + n * WP : rows + n * WP + WP], x[n]
        for i in range(to.size):
            to[i] = row[i]


@njit
def turn(s, rows, count, W, WP, turned):
    for n in range(0, count, 16):
        for c in range(0, min((W + 31) // 32 * 32, WP), 16):
            transpose16(at(s, rows + n * WP + c), WP, at(s, turned + n * WP + c * 16))


@njit
def save_turned(s, turned, block, WP, x):
    N, W = x.shape
    for n in range(0, N, 16):
        for c in range(0, W, 16):
            transpose16(at(s, turned + n * WP + c * 16), 16, at(s, block))
            for i in range(min(16, N - n)):
                row, to = s[block + 16 * i : block + 16 * i + 16], x[n + i, c : min(c + 16, W)]
                for j in range(to.size):
                    to[j] = row[j]


@njit
def split(s, x, to, rows, row, count, step, steps):
    """Words of x [rows, count], runs of 16 floats, where rows lie `row` floats apart and runs `step`. A word
    of a left operand is two values of a row, of runs 2 j and 2 j + 1; of a right one (rows < 0: their number
    is -rows), of rows 32 j + i and 32 j + 16 + i. Returns where they are: at `to`, in the order of x."""
    if steps is None:
        return x
    for i in range(abs(rows)):
        for j in range(count):
            o = i * row + j * step
            if rows < 0 and i & 16 == 0:
                split_pair(at(s, x + o), at(s, x + o + 16 * row), at(s, to + o), at(s, to + o + 16 * row))
            elif rows > 0 and j & 1 == 0:
                split_pair(at(s, x + o), at(s, x + o + step), at(s, to + o), at(s, to + o + step))
    return to


@njit
def sum_channels(s, rows, turned, N, D, WP, scores, Q, lanes, steps):
    """scores [N, lanes] = rows [N, D] @ turned [D, lanes]."""
    if steps is None:
        for i in range(0, lanes, LANES):
            for j in range(0, N, ROWS_T):
                by_channels(
                    at(s, rows + j * WP), WP, at(s, turned + i * WP), 16, at(s, scores + j * Q + i), Q, D, 0,
                    16 * WP, 16,
                )  # fmt: skip
    else:
        for j in range(0, N, 32):
            for i in range(0, lanes, 32):
                to, none = at(s, scores + j * Q + i), at(ZERO, 0)
                tile_product(
                    at(s, rows + j * WP), table_at(steps, 0), WP, 16, 16 * WP,
                    at(s, turned + i * WP), 512, 16, 256, 16 * WP,
                    none, none, 0, 0, to, shift(to, 16 * Q), Q, 16, (D + 31) // 32,
                )  # fmt: skip


@njit
def sum_keys(s, rows, scores, N, D, WP, turned, Q, lanes, steps):
    """turned [D, lanes] = rows [N, D]^T @ scores [N, lanes]; on the matrix unit the rows come turned."""
    if steps is None:
        for i in range(0, lanes, LANES):
            for d in range(0, D, ROWS_T):
                by_keys(
                    at(s, rows + d), WP, at(s, scores + i), Q, at(s, turned + i * WP + d * 16), 16, N, 0,
                    16, 16 * WP,
                )  # fmt: skip
    else:
        for d in range(0, D, 32):
            for i in range(0, lanes, 32):
                to, none = at(s, turned + i * WP + d * 16), at(ZERO, 0)
                tile_product(
                    at(s, rows + d * 16), table_at(steps, steps.size // 2), 16, 16 * WP, 256,
                    at(s, scores + i), 32 * Q, Q, 16 * Q, 16,
                    none, none, 0, 0, to, shift(to, 256), 16, 16 * WP, (N + 31) // 32,
                )  # fmt: skip


@njit
def sum_queries(s, scores, rows, N, D, WP, o, out, E, Q, n, add, steps):
    """o[out:] [N, D], rows of E floats, (+)= scores [N, n] @ rows [n, D]."""
    if steps is None:
        for j in range(0, N, TALL):
            for d in range(0, D, 16):
                to = at(o, out + j * E + d)
                by_queries(at(s, scores + j * Q), Q, at(s, rows + d), WP, to, E, n, add)
    else:
        for j in range(0, N, 32):
            for d in range(0, D, 32):
                to = at(o, out + j * E + d)
                first, row = (to, E) if add else (at(ZERO, 0), 0)
                tile_product(
                    at(s, scores + j * Q), table_at(steps, 0), Q, 16, 16 * Q,
                    at(s, rows + d), 32 * WP, WP, 16 * WP, 16,
                    first, shift(first, 16 * row), row, 16 if add else 0, to, shift(to, 16 * E), E, 16,
                    (n + 31) // 32,
                )  # fmt: skip


@parallel(flags=FAST)
def forward(job, worker, q, k, v, out, lse, heads, some, Q, NP, WP, scratch, tables, steps):
    _, N, C = q.shape
    D = C // heads
    P, scale = (D + 31) // 32 * 32, f32(1 / np.sqrt(D))
    s, table, size, block, S = scratch[worker], tables[worker], NP * WP, Q * WP, Q | 16
    run = np.int64(16)  # of a type that is no literal: `split` is compiled once
    scales, tops, totals, keys = s[:Q], s[Q : 2 * Q], s[2 * Q : 3 * Q], 3 * Q
    values, turned_v, queries = keys + size, keys + 2 * size, keys + 3 * size
    turned_q, scores = queries + block, queries + 2 * block
    table[0] = table[1] = s.ctypes.data + 4 * scores
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    c, last = first * D, min(first + some, heads)
    W = last * D - c
    load(k[b, :, c : c + W], s, keys, NP, WP)
    load(v[b, :, c : c + W], s, values, NP, WP)
    split(s, keys, keys, NP, WP, P // 16, run, steps)
    if steps is not None:
        begin()
        turn(s, values, NP, W, WP, turned_v)
        values = split(s, turned_v, turned_v, P, run, NP // 16, 16 * WP, steps)
    for n0 in range(0, N, Q):
        n, lanes = min(Q, N - n0), min(Q, NP - n0)
        load(q[b, n0 : n0 + n, c : c + W], s, queries, lanes, WP)
        turn(s, queries, lanes, W, WP, turned_q)
        split(s, turned_q, turned_q, -P, run, lanes // 16, 16 * WP, steps)
        for h in range(first, last):
            d = h * D - c
            sum_channels(s, keys + d, turned_q + d * 16, N, D, WP, scores, S, lanes, steps)
            for i in range(Q):
                scales[i], tops[i], totals[i] = scale, -np.inf, 0
            pass_top(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(tops, 0), Q)
            for i in range(Q):
                tops[i] *= scale
            pass_exp(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(totals, 0), Q)
            split(s, scores, scores, -NP, S, lanes // 16, run, steps)
            sum_keys(s, values + d, scores, N, D, WP, queries + d * 16, S, lanes, steps)
            for i in range(n):  # `log` is a number even of NaN, the rest of the sum is not
                lse[b, h, n0 + i] = tops[i] + log(totals[i]) + f32(0) * totals[i]
            for i in range(Q):
                totals[i] = f32(1) / totals[i]  # dividing D values here is dividing N scores there
            for i in range(0, lanes, 16):
                table[2] = table[3] = s.ctypes.data + 4 * (queries + d * 16 + i * WP)
                pass_share(table_at(table, 2), 0, D, 16, 16, at(totals, i), at(totals, 0), Q)
        save_turned(s, queries, scores, WP, out[b, n0 : n0 + n, c : c + W])
    if steps is not None:
        end()


@parallel(flags=FAST)
def backward(
    job, worker, dout, q, k, v, out, lse, dq, dk, dv, heads, some, Q, NP, WP, E, scratch, tables, steps
):
    _, N, C = q.shape
    D = C // heads
    P, scale = (D + 31) // 32 * 32, f32(1 / np.sqrt(D))
    s, table, size, block, S = scratch[worker], tables[worker], NP * WP, Q * WP, Q | 16
    run = np.int64(16)
    scales, less, dots, keys = s[:Q], s[Q : 2 * Q], s[2 * Q : (2 + some) * Q], (2 + some) * Q
    turned_k, values, dkeys = keys + size, keys + 2 * size, keys + 3 * size
    dvalues = dkeys + some * NP * E
    queries = dvalues + some * NP * E
    douts, turned_q, turned_d = queries + block, queries + 2 * block, queries + 3 * block
    result, p = queries + 4 * block, queries + 5 * block
    ds, copy = p + NP * S, p + 2 * NP * S
    sets = (heads + some - 1) // some
    b, first = job // sets, job % sets * some
    c, last = first * D, min(first + some, heads)
    W = last * D - c
    load(k[b, :, c : c + W], s, keys, NP, WP)
    load(v[b, :, c : c + W], s, values, NP, WP)
    across, there = keys, N % 32 == 0 and D % 32 == 0  # dk and dv are whole blocks
    if steps is not None:
        begin()
        turn(s, keys, NP, W, WP, turned_k)
        across = split(s, turned_k, turned_k, P, run, NP // 16, 16 * WP, steps)
    split(s, keys, keys, NP, WP, P // 16, run, steps)
    split(s, values, values, NP, WP, P // 16, run, steps)
    for n0 in range(0, N, Q):
        n, lanes = min(Q, N - n0), min(Q, NP - n0)
        load(out[b, n0 : n0 + n, c : c + W], s, queries, lanes, WP)
        turn(s, queries, lanes, W, WP, result)
        load(q[b, n0 : n0 + n, c : c + W], s, queries, lanes, WP)
        turn(s, queries, lanes, W, WP, turned_q)
        load(dout[b, n0 : n0 + n, c : c + W], s, douts, lanes, WP)
        turn(s, douts, lanes, W, WP, turned_d)
        for i in range(dots.size):
            dots[i] = 0
        for h in range(last - first):
            for i in range(0, lanes, 16):
                here = s.ctypes.data + 4 * (i * WP + h * D * 16)
                table[0], table[1] = here + 4 * result, here + 4 * turned_d
                pass_dot(table_at(table, 0), 0, D, 16, 16, at(dots, 0), at(dots, h * Q + i), Q)
        split(s, turned_q, turned_q, -P, run, lanes // 16, 16 * WP, steps)
        split(s, turned_d, turned_d, -P, run, lanes // 16, 16 * WP, steps)
        split(s, queries, queries, -lanes, WP, P // 16, run, steps)
        split(s, douts, douts, -lanes, WP, P // 16, run, steps)
        table[0] = table[1] = s.ctypes.data + 4 * p
        table[2] = table[3] = s.ctypes.data + 4 * ds
        for h in range(first, last):
            d = h * D - c
            of_k, of_v, to, row = s[dkeys:], s[dvalues:], (h - first) * NP * E, E
            if there:
                of_k, of_v, to, row = dk.reshape(-1), dv.reshape(-1), b * N * C + h * D, C
            sum_channels(s, keys + d, turned_q + d * 16, N, D, WP, p, S, lanes, steps)
            sum_channels(s, values + d, turned_d + d * 16, N, D, WP, ds, S, lanes, steps)
            for i in range(Q):
                scales[i], less[i] = scale, 0
            for i in range(n):
                less[i] = lse[b, h, n0 + i]
            pass_again(table_at(table, 0), 0, N, S, lanes, at(scales, 0), at(scales, 0), Q)
            for i in range(Q):
                less[i] = dots[(h - first) * Q + i]
            pass_ds(table_at(table, 1), 0, N, S, lanes, at(scales, 0), at(scales, 0), Q)
            right = split(s, ds, copy, -NP, S, lanes // 16, run, steps)
            split(s, p, p, NP, S, lanes // 16, run, steps)
            split(s, ds, ds, NP, S, lanes // 16, run, steps)
            sum_keys(s, across + d, right, N, D, WP, result + d * 16, S, lanes, steps)
            sum_queries(s, p, douts + d, N, D, WP, of_v, to, row, S, n, n0, steps)
            sum_queries(s, ds, queries + d, N, D, WP, of_k, to, row, S, n, n0, steps)
        save_turned(s, result, copy, WP, dq[b, n0 : n0 + n, c : c + W])
    if steps is not None:
        end()
    for h in range(first, first if there else last):
        to = (h - first) * NP * E
        save(s, dkeys + to, E, dk[b, :, h * D : h * D + D])
        save(s, dvalues + to, E, dv[b, :, h * D : h * D + D])


@functools.lru_cache(maxsize=64)
def _sizes(N, D, heads):
    """Heads of a job, queries at a time, rows and their floats rounded up, floats of a row of dk, steps."""
    NP = -(-N // 32) * 32
    Q = min(QUERIES if D <= NARROW else 2 * QUERIES, NP)
    if D > NARROW:
        # an odd number of cache lines, so that the rows of a tile use all sets of the cache
        WP, k = -(-D // 32) * 32 + 16, 32 * np.arange(max(NP, D) // 32 + 1, dtype=np.int64)
        return 1, Q, NP, WP, WP, np.concatenate([k, k * WP])
    # whole cache lines: two threads that write into the same one wait for each other
    some, E = min(heads, max(1, 64 // D)), -(-D // 16) * 16
    return some, Q, NP, -(-((some - 1) * D + E) // 16) * 16 | 16, E, None


def _tables():
    return shared("tables", (threads(), 4), np.int64)


def attention_forward(q, k, v, heads):
    B, N, C = q.shape
    out, lse = empty(q.shape), empty((B, heads, N))
    some, Q, NP, WP, _, steps = _sizes(N, C // heads, heads)
    room = scratch((3 * NP + 2 * Q) * WP + NP * (Q + 16) + 3 * Q)
    forward(B * -(-heads // some), q, k, v, out, lse, heads, some, Q, NP, WP, room, _tables(), steps)
    return out, lse


def attention_backward(dout, q, k, v, out, lse, heads):
    B, N, C = q.shape
    made = empty((3, *q.shape))
    dq, dk, dv = made
    some, Q, NP, WP, E, steps = _sizes(N, C // heads, heads)
    room = scratch((3 * NP + 5 * Q) * WP + 2 * some * NP * E + 3 * NP * (Q + 16) + (2 + some) * Q)
    jobs = B * -(-heads // some)
    backward(
        jobs, dout, q, k, v, out, lse, dq, dk, dv, heads, some, Q, NP, WP, E, room, _tables(), steps
    )  # fmt: skip
    return made
