"""Attention with wide heads on the matrix unit of tiles_cpu.py. Maths: attention_ref.py.

A job does one head of one image. Every matrix X in a product lies in blocks of 32 x 32, each 1024 words in
the order [(hi, lo), half, 16, 16]; blocks along a sum follow one another. Of a block there are two forms:
    left    word [h, i, j] = X[16 h + i, j] and X[16 h + i, 16 + j]     X is the left factor
    right   word [h, i, j] = X[i, 16 h + j] and X[16 + i, 16 h + j]     X is the right one
Turn each tile of 16 x 16 words, and the left form of X is the right one of X^T, the right form its left one.
A block of sums is [half of the columns, half of the rows, 16, 16], so that words of its left form can take
the place of its numbers. Queries are rows of the scores forward, columns backward: that turns the fewest.
"""

import numpy as np
from numba import carray

from nanodiff.kernels.parallel_cpu import njit, parallel, scratch, shared, threads
from nanodiff.kernels.random_cpu import log
from nanodiff.kernels.simd_cpu import at, choose, larger, make_rows, shift, split_words, table_at
from nanodiff.kernels.tiles_cpu import begin, end, split_pair, tile_product, transpose16

f32, ZERO = np.float32, np.zeros(16, np.float32)
BLOCK = 1024
# TURNED: the left form, each tile turned. SOME: queries at a time. BLOCKS: instead of the floats of a row.
# FIRST: of several sums. Numbers of NumPy, since Numba compiles a function again for every literal
LEFT, RIGHT, TURNED, SOME, BLOCKS, FIRST = np.int64([0, 1, 2, 32, 0, 0])
CHUNK = 256  # tokens of a backward at a time: all that is read again and again stays in a 2 MB L2 cache
STEPS = BLOCK * np.arange(4096, dtype=np.int64)


def exp_words(x, y, scale, top):
    x, y = ((x - top) * scale).exp(), ((y - top) * scale).exp()
    return *split_words(x, y), x + y


def block_words(a, b, c, d):
    (hi, lo), (next_hi, next_lo) = split_words(a, b), split_words(c, d)
    return hi, next_hi, lo, next_lo


def ds_words(*x):
    """Of the quarters of a block of scores and of dp: the words of p, of ds, and of ds in the right form."""
    s, dp, less, dot, scale = x[:4], x[4:8], x[8:10], x[10:12], x[12]
    logs = [s[i] * scale - less[i // 2] for i in range(4)]
    p = [choose(z, 0, z).exp() for z in logs]  # above 0 only where there is no key: no infinity there
    a, b, c, d = (p[i] * (dp[i] - dot[i // 2]) * scale for i in range(4))
    return *block_words(p[0], p[2], p[1], p[3]), *block_words(a, c, b, d), *block_words(a, b, c, d)


pass_top = make_rows(lambda s: (s,), 1, 0, 1, output=0, combine=larger, soon=0)
pass_exp = make_rows(exp_words, 2, 2, 1, output=2, soon=0)
pass_ds = make_rows(ds_words, 8, 5, 0, output=12, soon=0)


@njit
def copy(x, row, N, D, y, next, NP, P):
    """y (NP, P) = x (N, D), rows of `row` and `next` floats, and zeros: in rows below x up to `next`."""
    for n in range(N):
        to, source = carray(shift(y, n * next), P), carray(shift(x, n * row), D)
        for i in range(D):
            to[i] = source[i]
        for i in range(D, P):
            to[i] = 0
    below = carray(shift(y, N * next), (NP - N) * next)
    for i in range(below.size):
        below[i] = 0


@njit
def whole(x, b, h, s, to, known):
    """The address of head h of image b of x (B, N, heads, D), and the floats from row to row; where those are
    not whole blocks, of a copy at s[to:], of what is known."""
    _, N, heads, D = x.shape
    here, NP, P = at(x, (b * N * heads + h) * D), (N + 31) // 32 * 32, (D + 31) // 32 * 32
    if N == NP and D == P:
        return here, heads * D
    if known:
        copy(here, heads * D, N, D, at(s, to), P, NP, P)
    return at(s, to), P


@njit
def save(made, row, x, b, h):
    """What was made in a copy goes where it belongs."""
    _, N, heads, D = x.shape
    if N % 32 or D % 32:
        copy(made, row, N, D, at(x, (b * N * heads + h) * D), heads * D, N, D)


@njit
def turn(s, words, count):
    for i in range(words, words + count, 256):
        transpose16(at(s, i), 16, at(s, i))


@njit
def split(x, row, N, P, s, to, form):
    """The words of x (N, P) to s[to:]."""
    half, other = (16, 16 * row) if form == RIGHT else (16 * row, 16)
    down, across = (BLOCK, 32 * N) if form == RIGHT else (32 * P, BLOCK)
    for n in range(0, N, 32):
        for i in range(16):
            for h in range(2):
                for p in range(P // 32):
                    a = shift(x, (n + i) * row + h * half + 32 * p)
                    hi = at(s, to + n // 32 * down + p * across + 256 * h + 16 * i)
                    split_pair(a, shift(a, other), hi, shift(hi, 512))
    if form == TURNED:
        turn(s, to, N * P)


@njit
def multiply(x, y, N, M, K, out, row, add):
    """out [N, M] (+)= x [N, K] @ y [K, M], added unless `add` is 0; out has rows of `row` floats or, if that
    is 0, blocks."""
    half, lower, down, across = (16, 16 * row, 32 * row, 32) if row else (512, 256, 32 * M, BLOCK)
    for m in range(M // 32):
        for n in range(N // 32):
            to, r = shift(out, n * down + m * across), row if row else 16
            first, r0, half0, lower0 = (to, r, half, lower) if add else (at(ZERO, 0), 0, 0, 0)
            tile_product(
                shift(x, n * 32 * K), table_at(STEPS, 0), 16, 512, 256,
                shift(y, m * 32 * K), BLOCK, 16, 512, 256,
                first, shift(first, lower0), r0, half0, to, shift(to, lower), r, half, K // 32,
            )  # fmt: skip


@njit(flags={"reassoc"})
def fold(s, x, most):
    """Of each of 32 runs of 16 numbers, all become the largest (`most`) or the sum."""
    for i in range(x, x + 512, 16):
        run = carray(at(s, i), 16)
        total = run[0]
        for j in range(1, 16):
            total = (total if total > run[j] else run[j]) if most else total + run[j]
        for j in range(16):
            run[j] = total


@njit
def hide(s, scores, N, NP, tops, less):
    """Keys that there are not get scores so far below the largest that they add nothing to the sum (though
    more than the smallest of numbers, with which processors are slow)."""
    for m in range(N, NP):
        for i in range(32):
            s[scores + m // 16 * 512 + 16 * i + m % 16] = s[tops + 16 * i] - less


@njit(flags={"contract", "reassoc"})
def dot(x, y, n):
    x, y, total = carray(x, n), carray(y, n), f32(0)
    for k in range(n):
        total += x[k] * y[k]
    return total


@parallel(flags={"contract"})
def forward(job, worker, lse, q, k, v, out, scratch, tables):
    _, N, heads, D = q.shape
    NP, P, b, h = (N + 31) // 32 * 32, (D + 31) // 32 * 32, job // heads, job % heads
    s, table, size, scale = scratch[worker], tables[worker], NP * P, f32(1 / np.sqrt(D))
    less, tops, totals, keys = f32(40) / scale, 512, 1024, 1536  # at 0 the scale; all for 32 queries x 16
    values, queries = keys + size, keys + 2 * size
    scores, room = queries + 32 * P, queries + 32 * (P + NP)
    k0, row = whole(k, b, h, s, room, True)
    v0, row = whole(v, b, h, s, room + size, True)
    q0, row = whole(q, b, h, s, room + 2 * size, True)
    o0, row = whole(out, b, h, s, room + 3 * size, False)
    begin()
    split(k0, row, NP, P, s, keys, TURNED)
    split(v0, row, NP, P, s, values, RIGHT)
    s[:tops] = scale
    table[0] = table[2] = s.ctypes.data + 4 * scores
    table[1] = table[3] = table[0] + 4 * 512
    for n in range(0, NP, 32):
        split(shift(q0, n * row), row, SOME, P, s, queries, LEFT)
        multiply(at(s, queries), at(s, keys), SOME, NP, P, at(s, scores), BLOCKS, FIRST)
        s[tops:totals] = -np.inf
        s[totals:keys] = 0
        hide(s, scores, N, NP, tops, less)
        pass_top(table_at(table, 0), 0, NP // 16, 512, 512, at(s, 0), at(s, tops), 512)
        fold(s, tops, True)
        hide(s, scores, N, NP, tops, less)
        pass_exp(table_at(table, 0), 0, NP // 32, BLOCK, 512, at(s, 0), at(s, totals), 512)
        fold(s, totals, False)
        multiply(at(s, scores), at(s, values), SOME, P, NP, shift(o0, n * row), row, FIRST)
        for i in range(min(32, N - n)):  # `log` is a number even of NaN, the rest of the sum is not
            total, o = s[totals + 16 * i], carray(shift(o0, (n + i) * row), P)
            lse[b, h, n + i] = s[tops + 16 * i] * scale + log(total) + f32(0) * total
            share = f32(1) / total  # dividing P values here is dividing NP scores there
            for j in range(P):
                o[j] *= share
    end()
    save(o0, row, out, b, h)


@parallel(flags={"contract"})
def backward(job, worker, lse, dout, q, k, v, out, dq, dk, dv, scratch, tables):
    _, N, heads, D = q.shape
    NP, P, b, h = (N + 31) // 32 * 32, (D + 31) // 32 * 32, job // heads, job % heads
    s, table, size, scale = scratch[worker], tables[worker], NP * P, f32(1 / np.sqrt(D))
    T = min(CHUNK, NP)
    queries = T // 32 * 80  # before that, of 32 queries: their lse, their dots, 16 times the scale
    douts, keys, values = queries + T * P, queries + 2 * T * P, queries + 2 * T * P + 32 * P
    p = values + 32 * P
    ds, turned, room = p + T * T, p + 2 * T * T, p + 3 * T * T
    q_, row = whole(q, b, h, s, room, True)
    k_, row = whole(k, b, h, s, room + size, True)
    v_, row = whole(v, b, h, s, room + 2 * size, True)
    o_, row = whole(out, b, h, s, room + 3 * size, True)
    do, row = whole(dout, b, h, s, room + 4 * size, True)
    dq_, row = whole(dq, b, h, s, room + 5 * size, False)
    dk_, row = whole(dk, b, h, s, room + 6 * size, False)
    dv_, row = whole(dv, b, h, s, room + 7 * size, False)
    begin()
    for n0 in range(0, NP, T):
        R = min(T, NP - n0)
        q0, d0 = shift(q_, n0 * row), shift(do, n0 * row)
        for n in range(R):  # sum of p dp = dout . out
            i = n // 32 * 80 + n % 32
            s[i] = lse[b, h, n0 + n] if n0 + n < N else 0
            s[i + 32] = dot(shift(o_, (n0 + n) * row), shift(d0, n * row), P)
            s[n // 32 * 80 + 64 + n % 16] = scale
        for m0 in range(0, NP, T):
            M = min(T, NP - m0)
            k0, v0 = shift(k_, m0 * row), shift(v_, m0 * row)
            split(d0, row, R, P, s, douts, TURNED)
            split(q0, row, R, P, s, queries, TURNED)
            for m in range(0, M, 32):
                split(shift(k0, m * row), row, SOME, P, s, keys, LEFT)
                split(shift(v0, m * row), row, SOME, P, s, values, LEFT)
                multiply(at(s, keys), at(s, queries), SOME, R, P, at(s, p + m * R), BLOCKS, FIRST)
                multiply(at(s, values), at(s, douts), SOME, R, P, at(s, ds + m * R), BLOCKS, FIRST)
                for n in range(0, R, 32):
                    here, across = s.ctypes.data + 4 * (m * R + 32 * n), turned + n * M + 32 * m
                    for i in range(4):
                        table[i] = table[8 + i] = here + 4 * (p + 256 * i)
                        table[4 + i] = table[12 + i] = here + 4 * (ds + 256 * i)
                        table[16 + i] = s.ctypes.data + 4 * (across + 256 * i)
                    pass_ds(table_at(table, 0), 0, 16, 16, 16, at(s, n // 32 * 80), at(s, 0), 16)
                    turn(s, across, BLOCK)
            # split again, in the place of the other form: both at once would not leave L2 enough for the rest
            split(d0, row, R, P, s, douts, RIGHT)
            multiply(at(s, p), at(s, douts), M, P, R, shift(dv_, m0 * row), row, n0)
            split(q0, row, R, P, s, queries, RIGHT)
            multiply(at(s, ds), at(s, queries), M, P, R, shift(dk_, m0 * row), row, n0)
            split(k0, row, M, P, s, queries, RIGHT)
            multiply(at(s, turned), at(s, queries), R, P, M, shift(dq_, n0 * row), row, m0)
    end()
    save(dq_, row, dq, b, h)
    save(dk_, row, dk, b, h)
    save(dv_, row, dv, b, h)


def attention(body, lse, *arrays):
    """Run `forward` or `backward` for every head of arrays (B, N, C), in the order of its arguments."""
    B, heads, N = lse.shape
    views = [x.reshape(B, N, heads, -1) for x in arrays]
    NP, P = -(-N // 32) * 32, -(-views[0].shape[3] // 32) * 32
    T, copies = min(CHUNK, NP), 8 if NP > N or P > views[0].shape[3] else 0
    room = scratch(3 * T * (T + 1) + (2 * T + 64 + (3 + copies) * NP) * P)
    body(B * heads, lse, *views, room, shared("tables", (threads(), 24), np.int64))
