"""Convolutions and linear layers on the matrix unit of tiles_cpu.py: every kernel size, stride, padding and
width.

One picture covers them all. Lay the pixels of a batch end to end, rows of P positions, R rows an image, with
just enough zeros between rows and between images that no window reaches a pixel of another row. A tap of a
window is then a distance along that line, the same for all pixels:
    out[q] = bias + sum over taps of line[q + distance] @ weight[tap]
and 16 consecutive positions are the rows of a tile, wherever the images break. What is no output pixel is
computed and not written: 27 % of 8x8; nothing where a row is some whole tiles. A stride s looks at s * s
lines, one for each remainder of the coordinates divided by s, which a tap names; so does nothing else need to
know of strides. Gradients:
    dx      the same convolution of dout with turned weights; behind a stride one for each remainder
    dweight[tap] = sum over q of line[q]^T dout[q - distance]: a product along the line

Lines are not kept. A job splits its part of x (tiles_cpu.py) into scratch memory that stays in its L2 cache:
    frame [line, C/32, (hi, lo), position, 16 words]      word i = channels i and i + 16 of 32
    weight [O/32, C/32 * taps, 2, (hi, lo), 16, 16]       the same words of 2 x 16 output channels: tiles of B
and for a weight gradient, where the sum runs along the line, a word = positions q and q + 1:
    xt [line, position/32, C/16, (hi, lo), 16, 16]        channels by words: tiles of A
    pairs [O/16, q % 2, (hi, lo), q/2, 16]                at every q, so that any distance has its pairs
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, njit, parallel, scratch, shared
from nanodiff.kernels.simd_cpu import at, make_rows, prefetch, shift, table_at
from nanodiff.kernels.sums_cpu import sum_first, widened, zeros
from nanodiff.kernels.tiles_cpu import (
    TILE,
    add_runs,
    begin,
    end,
    split_pair,
    tile_plus,
    tile_product,
    transpose16,
)

STEP = 1024  # words of B for one step of tile_product
NONE, ZERO = np.zeros(0, np.float32), np.zeros(16, np.float32)
FRAME = (
    1 << 16
)  # words of a frame, an eighth of a 2 MB L2 cache, that a job should not exceed; of several lines half
SOON, NEAR = 1, 4  # blocks of weights and rows of x that are asked for ahead
DEEP = 4  # steps of 32 positions for which a weight gradient's operands stay in the L1 cache
CHUNK = 1 << 18  # words of operands that a job of it makes at a time: half of a 2 MB L2 cache


# ---- where everything is: tables that depend on shapes alone ----
@dataclass(frozen=True, eq=False)
class Plan:
    """source[line, q]: the row of x at position q, -1 for zero; taps[k]: (line, distance, tap of the weights)
    of the outputs of class k; span: the largest distance.
    starts[t]: the position of the first row of tile t, an even number of them; rows[16 (k tiles + t) + i]:
    the row of out that its row i goes to, -1 for none; run[k, t]: the first of them, if all 16 are `apart`
    from one another, else -1."""

    source: np.ndarray
    taps: tuple
    span: int
    starts: np.ndarray
    rows: np.ndarray
    run: np.ndarray
    apart: int


@dataclass(frozen=True, eq=False)
class Back:
    """source, span: as in a Plan; target[line, q]: the row of dout at position q - span, -1 for none, each
    once on one of the lines; taps: (line of x, span - distance, tap, line of dout); n: the positions."""

    source: np.ndarray
    taps: np.ndarray
    span: int
    target: np.ndarray
    n: int


def _pitch(size, out, stride, low, more):
    """The fewest positions for `out` outputs such that those of `more` further on may share the next row's
    first: zeros both."""

    def zero(c):
        return not any(0 <= stride * (c + low) + line < size for line in range(stride))

    return next(
        p for p in range(out, out + more + 1) if all(zero(c) and zero(c - p) for c in range(p, out + more))
    )


def _shifts(size, out, stride, taps):
    """Along each axis the smallest shift of a window in outputs, by how much the largest exceeds it, and the
    pitch."""
    shifts = [[tap[axis] // stride for tap in taps] for axis in (0, 1)]
    low, more = [min(s) for s in shifts], [max(s) - min(s) for s in shifts]
    return low, more, [_pitch(size[a], out[a], stride, low[a], more[a]) for a in (0, 1)]


def _lines(B, size, stride, row, columns, R, P, n):
    """Where the pixels are on each line, (stride * columns, n): R x P positions an image, of pixels from
    (row + i, column) on, a stride apart, for i < stride and each column."""
    source = np.full((stride, len(columns), n), -1, np.int32)
    for i in range(stride):
        for j, column in enumerate(columns):
            v, w = (row + stride * np.arange(R) + i)[:, None], column + stride * np.arange(P)
            inside = (v >= 0) & (v < size[0]) & (w >= 0) & (w < size[1])
            rows = np.arange(B)[:, None, None] * size[0] * size[1] + np.where(inside, v * size[1] + w, 0)
            source[i, j, : B * R * P] = np.where(inside, rows, -1).ravel()
    return source.reshape(-1, n)


def _plan(B, size, out, stride, classes, target, apart=1):
    """size, out: (H, W) of x and of one class of outputs. classes: for each a list of (row shift, column
    shift, tap); output (y, x) reads pixel (y, x) * stride + shift. target(k): the rows of out of its outputs,
    (B, h, w), neighbours of which are `apart`."""
    members = [tap for taps in classes for tap in taps]
    low, more, (R, P) = _shifts(size, out, stride, members)
    columns = [stride * low[1] + j for j in range(stride)]
    narrow = more[1] > 0 and out[1] in (1, 2, 4, 8)
    if narrow:  # whole rows in a tile: a line for each column of a window instead of zeros between rows
        P, columns = out[1], sorted({tap[1] for tap in members})
    n, span = -(-B * R * P // 32) * 32, more[0] * P + (not narrow) * more[1]
    source = _lines(B, size, stride, stride * low[0], columns, R, P, n + span + 32)
    # tiles of 16 positions end to end, or of whole images, or, if images are so wide, along their rows: the
    # last ends with the row
    if out[1] >= 16:
        within = np.minimum(np.arange(0, out[1], 16), out[1] - 16)
        first = (np.arange(B)[:, None, None] * R + np.arange(out[0])[:, None]) * P + within
    elif narrow and out[0] * P % 16 == 0:
        first = np.arange(B)[:, None] * R * P + np.arange(0, out[0] * P, 16)
    else:
        first = np.arange(0, n, 16)
    starts = np.append(first, first.flat[-1:].repeat(first.size % 2)).astype(np.int32)
    targets, taps = np.full((len(classes), n), -1, np.int32), []
    for k, some in enumerate(classes):
        full, found = np.full((B, R, P), -1, np.int32), target(k)
        full[:, : found.shape[1], : found.shape[2]] = found
        targets[k, : full.size] = full.ravel()
        taps.append(tuple(
            (i % stride * len(columns) + (columns.index(j) if narrow else j % stride),
             (i // stride - low[0]) * P + (0 if narrow else j // stride - low[1]), tap)
            for i, j, tap in some
        ))  # fmt: skip
    rows = targets[:, starts[:, None] + np.arange(16)]
    rows[:, first.size :] = -1  # of the tile that makes their number even
    run = np.where((np.diff(rows) == apart).all(2) & (rows[:, :, 0] >= 0), rows[:, :, 0], -1)
    return Plan(source, tuple(taps), span, starts, rows.ravel(), np.ascontiguousarray(run), apart)


def _windows(H, W, kh, kw, stride, pad):
    """(OH, OW), and (row shift, column shift, tap) of each pixel of a window."""
    taps = [(i - pad[0], j - pad[0], i * kw + j) for i in range(kh) for j in range(kw)]
    return ((H + sum(pad) - kh) // stride + 1, (W + sum(pad) - kw) // stride + 1), taps


@functools.lru_cache(maxsize=256)
def forward_plan(B, H, W, kh, kw, stride, pad):
    out, taps = _windows(H, W, kh, kw, stride, pad)
    pixels = np.arange(B * out[0] * out[1]).reshape(B, *out)
    return _plan(B, (H, W), out, stride, [taps], lambda k: pixels)


@functools.lru_cache(maxsize=256)
def gradient_plan(B, H, W, kh, kw, stride, pad):
    """dx[y] = sum of dout[(y + pad - i) / stride] @ weight[i]^T over the taps i for which that is a whole
    number: a class of pixels for each remainder of y and x divided by the stride."""
    out = _windows(H, W, kh, kw, stride, pad)[0]
    corners = [(y, x) for y in range(stride) for x in range(stride)]
    classes = [
        [
            ((y + pad[0] - i) // stride, (x + pad[0] - j) // stride, i * kw + j)
            for i in range(kh)
            for j in range(kw)
            if (y + pad[0] - i) % stride == 0 and (x + pad[0] - j) % stride == 0
        ]
        for y, x in corners
    ]
    pixels, most = np.arange(B * H * W).reshape(B, H, W), (-(-H // stride), -(-W // stride))

    def rows(k):
        return pixels[:, corners[k][0] :: stride, corners[k][1] :: stride]

    return _plan(B, out, most, 1, classes, rows, stride)


@functools.lru_cache(maxsize=256)
def weight_plan(B, H, W, kh, kw, stride, pad):
    """dweight[tap] = sum over the outputs of its pixel of x times dout."""
    (OH, OW), taps = _windows(H, W, kh, kw, stride, pad)
    low, more, (R, P) = _shifts((H, W), (OH, OW), stride, taps)
    n, span = -(-B * R * P // 32) * 32, more[0] * P + more[1]
    columns = [stride * low[1] + j for j in range(stride)]
    source = _lines(B, (H, W), stride, stride * low[0], columns, R, P, n + span + 32)
    full, target = np.full((B, R, P), -1), np.full((1, n + 2 * span + 96), -1, np.int32)
    full[:, :OH, :OW] = np.arange(B * OH * OW).reshape(B, OH, OW)
    target[0, span : span + full.size] = full.ravel()
    back = [
        (i % stride * stride + j % stride, span - (i // stride - low[0]) * P - j // stride + low[1], tap, 0)
        for i, j, tap in taps
    ]
    return Back(source, np.array(back, np.int64), span, target, n)


@functools.lru_cache(maxsize=256)
def doubled_plan(B, H, W, a, b):
    """Of the weight gradient of a 3x3 convolution of images made twice as large: the four dK[u, v] of
    `doubled` (conv_cpu.py) that make pixels (2y + a, 2x + b)."""
    taps = [((u == 0) - (u == 3), (v == 0) - (v == 3), 4 * u + v)
            for u in range(1 - a, 4, 2) for v in range(1 - b, 4, 2)]  # fmt: skip
    R, P = _pitch(H, H, 1, -1, 2), _pitch(W, W, 1, -1, 2)
    n, span = -(-B * R * P // 32) * 32, 2 * P + 2
    source = _lines(B, (H, W), 1, -1, [-1], R, P, n + span + 32)
    full, target = np.full((B, R, P), -1), np.full((1, n + 2 * span + 96), -1, np.int32)
    full[:, :H, :W] = np.arange(4 * B * H * W).reshape(B, H, 2, W, 2)[:, :, a, :, b]
    target[0, span : span + full.size] = full.ravel()
    back = [(0, span - (y + 1) * P - x - 1, tap, 0) for y, x, tap in taps]
    return Back(source, np.array(back, np.int64), span, target, n)


@functools.lru_cache(maxsize=256)
def stack_plans(N, S):
    """S linear layers of the same N rows: plans of y, in which each is a class and its outputs follow those
    of the one before; of dx, in which each has a line and all add up; and of dweight."""
    rows, layers = np.arange(N), range(S)
    y = _plan(1, (1, N), (1, N), 1, [[(0, 0, s)] for s in layers], lambda s: (rows + s * N)[None, None])
    one, more = forward_plan(1, 1, N, 1, 1, 1, (0, 0)), y.source.shape[1] - N
    line = [np.pad(rows + s * N, (0, more), constant_values=-1) for s in layers]
    source, target = np.array(line, np.int32), np.pad(line, ((0, 0), (0, 64)), constant_values=-1)
    dx = replace(one, source=source, taps=(tuple((s, 0, s) for s in layers),))
    taps = np.array([(0, 0, s, s) for s in layers], np.int64)
    return y, dx, Back(y.source, taps, 0, target.astype(np.int32), y.source.shape[1] - 32)


# ---- y and dx ----
def _padded(x):  # (rows, C) -> (rows, C16), C16 a multiple of 16
    more = -x.shape[1] % 16
    return widened(x, x.shape[1] + more) if more else x


@njit
def bias_tiles(flat, sums, rows, first, o, bias, area):
    """Four tiles at flat[sums:] = the bias of each of the outputs rows[first : first + 32], 32 channels from
    o on."""
    for i in range(1024):
        row, c = rows[first + i // 512 * 16 + i // 16 % 16], o + i // 256 % 2 * 16 + i % 16
        b = row // area if bias.shape[0] > 1 else 0
        flat[sums + i] = bias[b, c] if (row >= 0) & (c < bias.shape[1]) else np.float32(0)


@njit
def write_tiles(flat, sums, rows, first, o, residual, out):
    """What is an output in four tiles, plus residual, into out."""
    O, plus = out.shape[1], residual.size > 0
    for i in range(32):
        row = rows[first + i]
        for half in range(2 if row >= 0 else 0):
            c, s = o + 16 * half, sums + (i // 16 * 2 + half) * TILE + i % 16 * 16
            if c + 16 <= O:
                more = at(residual, row * O + c) if plus else at(ZERO, 0)
                add_runs(at(flat, s), more, at(ZERO, 0), at(out, row * O + c))
            else:
                for j in range(O - c):
                    out[row, c + j] = flat[s + j] + (residual[row * O + c + j] if plus else np.float32(0))


@parallel
def line_products(
    job, worker, x, source, weight, steps, ends, starts, rows, run, biased, bias, residual, out, scratch,
    numbers,
):  # fmt: skip
    """A job: some of the tiles, one of `groups` groups of output channels. C is a multiple of 16.
    biased[k, t]: the row of bias that all outputs of tiles t and t + 1 have, or -1."""
    block, span, length, groups, area, apart = numbers
    (lines, _), C, O, (classes, tiles) = source.shape, x.shape[1], out.shape[1], run.shape
    t0, group, blocks, panels = job // groups * block, job % groups, (C + 31) // 32, (O + 31) // 32
    t1, q0, frame, flat = min(t0 + block, tiles), starts[t0], worker * scratch.shape[1], scratch.reshape(-1)
    sums, none, lo = frame + lines * blocks * length * 32, at(ZERO, 0), length * 16
    for line in range(lines):
        for i in range(starts[t1 - 1] + 16 + span - q0):
            row, later = source[line, q0 + i], source[line, q0 + i + NEAR]
            if later >= 0:
                prefetch(at(x, later * C), C)
            for c in range(blocks):
                to = at(flat, frame + ((line * blocks + c) * 2 * length + i) * 16)
                if (row >= 0) & (c * 32 + 16 < C):
                    first = at(x, row * C + c * 32)
                    split_pair(first, shift(first, 16), to, shift(to, lo))
                else:
                    split_pair(at(x, row * C + c * 32) if row >= 0 else none, none, to, shift(to, lo))
    begin()
    c0, c1 = at(flat, sums), at(flat, sums + 2 * TILE)
    for k in range(classes):
        depth, places = ends[k + 1] - ends[k], table_at(steps, ends[k])
        for o in range(group * panels // groups, (group + 1) * panels // groups):
            panel, whole = at(weight, (ends[k] * panels + o * depth) * STEP), o * 32 + 32 <= O
            for t in range(t0, t1, 2):
                a, a_half = at(flat, frame + (starts[t] - q0) * 16), (starts[t + 1] - starts[t]) * 16
                p, q, first = run[k, t], run[k, t + 1], (k * tiles + t) * 16
                b = biased[k, t] if bias.shape[0] > 1 else 0
                # sums begin at the bias, one row of it if that serves all
                b0, b1, repeat, half = c0, c1, 16, TILE
                if whole & (b >= 0):
                    b0 = at(bias, b * O + o * 32)
                    b1, repeat, half = b0, 0, 16
                else:
                    bias_tiles(flat, sums, rows, first, o * 32, bias, area)
                # and go straight to out, unless there is something to add or to leave out
                if whole & (p >= 0) & (q >= 0) & (residual.size == 0):
                    tile_product(
                        a, places, 16, lo, a_half, panel, STEP, 16, TILE, 512, b0, b1, repeat, half,
                        at(out, p * O + o * 32), at(out, q * O + o * 32), O * apart, 16, depth,
                    )  # fmt: skip
                else:
                    tile_product(
                        a, places, 16, lo, a_half, panel, STEP, 16, TILE, 512, b0, b1, repeat, half,
                        c0, c1, 16, TILE, depth,
                    )  # fmt: skip
                    if whole & (p >= 0) & (q >= 0):
                        for i in range(4):
                            here = (p if i < 2 else q) * O + o * 32 + i % 2 * 16
                            tile_plus(shift(c0, i * TILE), at(residual, here), at(out, here), O * apart)
                    else:
                        write_tiles(flat, sums, rows, first, o * 32, residual, out)
    end()


@functools.lru_cache(maxsize=1024)
def _layout(plan, C, O, area, threads):
    """How `products` cuts its work: the number of jobs, words of a frame, tables. It changes no bit of
    them."""
    lines, blocks, tiles = len(plan.source), -(-C // 32), len(plan.starts)
    fit = max(4, (4 if lines > 1 else 1) * FRAME // (lines * blocks * 512))
    count = max(1, -(-tiles // fit))
    count = -(-count // threads) * threads if tiles >= 16 * threads else 1
    block = -(-tiles // count // 2) * 2
    count = -(-tiles // block)
    groups = min(threads, -(-O // 32)) if count < threads else 1
    length = 16 + plan.span + max(
        int(plan.starts[min(t + block, tiles) - 1] - plan.starts[t]) for t in range(0, tiles, block)
    ) | 1  # fmt: skip
    # where in a frame each step of the sum begins, all classes end to end, and where in them each class
    # begins
    steps = [
        ((line * blocks + c) * 2 * length + distance) * 16
        for members in plan.taps
        for c in range(blocks)
        for line, distance, _ in members
    ]
    ends = np.cumsum([0] + [blocks * len(members) for members in plan.taps]).astype(np.int64)
    rows = plan.rows.reshape(-1, 32)  # of pairs of tiles
    images = np.where(rows >= 0, rows // area, -1).max(1)
    same = (rows < 0) | (rows // area == images[:, None])
    biased = np.where(same.all(1), images, -1).repeat(2).reshape(plan.run.shape)
    numbers = np.array([block, plan.span, length, groups, area, plan.apart], np.int64)
    return (
        count * groups,
        lines * blocks * length * 32,
        np.array(steps + [0], np.int64),
        ends,
        biased,
        numbers,
    )


def products(plan, x, weight, bias, out, residual=None):
    """Fill out (rows, O) by a plan. x (rows, C), weight as made by tile_weights, bias (1 or B, O)."""
    x, threads = _padded(x), parallel_cpu.threads()
    jobs, words, steps, ends, biased, numbers = _layout(
        plan, x.shape[1], out.shape[1], len(out) // len(bias), threads
    )
    more = NONE if residual is None else residual.reshape(-1)
    line_products(
        jobs, x, plan.source, weight.reshape(-1), steps, ends, plan.starts, plan.rows, plan.run, biased, bias,
        more, out, scratch(words + 1024), numbers,
    )  # fmt: skip


@njit
def tile_block(source, row, turned, out, half):
    """The tiles of B of one 32 x 32 block, whose rows lie `row` floats apart: the block is [sum, columns] or,
    if turned, [columns, sum]. half: 512 floats."""
    for h in range(2):
        first, second, step = shift(source, 16 * h), shift(source, 16 * h + 16 * row), row
        if turned:
            transpose16(shift(source, 16 * h * row), row, half)
            transpose16(shift(source, 16 * h * row + 16), row, shift(half, 256))
            first, second, step = half, shift(half, 256), 16
        for i in range(16):
            hi = shift(out, h * 512 + i * 16)
            split_pair(shift(first, i * step), shift(second, i * step), hi, shift(hi, 256))


@parallel
def split_weights(job, worker, weight, taps, ends, turned, out, scratch):
    """out[class][panel, c block, tap] for the taps ends[k] .. ends[k + 1] of class k; a job is 32 rows of all
    taps, from left to right: weights come from memory, in its order, some blocks ahead of their use."""
    _, C, O = weight.shape
    blocks, panels = ((O + 31) // 32, (C + 31) // 32) if turned else ((C + 31) // 32, (O + 31) // 32)
    block, half = scratch[worker, :1024].reshape(32, 32), scratch[worker, 1024:]
    row, wide, high = job * 32, (O + 31) // 32, min(32, C - job * 32)
    for k in range(ends.size - 1):
        depth = ends[k + 1] - ends[k]
        for u in range(depth * wide):
            t, column, later = u // wide, u % wide * 32, u + SOON
            if later < depth * wide:
                w = weight[taps[ends[k] + later // wide]]
                for i in range(high):
                    prefetch(at(w, (row + i) * O + later % wide * 32), 32)
            w = weight[taps[ends[k] + t]]
            source, apart = at(w, row * O + column), O
            if (high < 32) | (column + 32 > O):
                for i in range(32):
                    for j in range(32):
                        there = (i < high) & (column + j < O)
                        block[i, j] = w[row + i, column + j] if there else np.float32(0)
                source, apart = at(block, 0), 32
            panel, c = (job, u % wide) if turned else (u % wide, job)
            to = ((ends[k] * panels + panel * depth) * blocks + c * depth + t) * STEP
            tile_block(source, apart, turned, at(out, to), at(half, 0))


@functools.lru_cache(maxsize=256)
def _taps(taps):
    """The taps of the weights that a plan's classes read, end to end, and where each class begins."""
    ends = np.cumsum([0] + [len(members) for members in taps]).astype(np.int64)
    return np.array([tap for members in taps for _, _, tap in members], np.int64), ends


def tile_weights(weight, plan, turned=False, keep=False):
    """Weights (taps, C, O) as tiles of B, (panels, blocks, taps, STEP), as the plan reads them; turned: for
    dx. Unless they are to be kept, the next ones go into the same memory."""
    (_, C, O), (taps, ends) = weight.shape, _taps(plan.taps)
    blocks, panels = (-(-n // 32) for n in ((O, C) if turned else (C, O)))
    shape = panels, blocks, len(taps), STEP
    out = empty(shape) if keep else shared("weights", shape)
    split_weights(-(-C // 32), weight, taps, ends, int(turned), out, scratch(1536))
    return out


# ---- dweight ----
pass_sum = make_rows(lambda x: (x,), 1, 0, 1, output=False)


@njit
def add_pixels(target, first, last, count, area, dout, o0, o1, sums, split, table):
    """sums[split, image] += rows of dout, channels o0 .. o1, for the positions first .. last of target: each
    is `count` rows from target[count * position] on, none where that is -1; an image has `area` rows."""
    O, q = dout.shape[1], first
    table[0] = dout.ctypes.data + o0 * 4
    while q < last:
        row, end = target[q * count], q + 1
        if row >= 0:
            here = at(sums, (split * sums.shape[1] + row // area) * O + o0)
            after = min(last, q + (area - row % area) // count)
            while (end < after) and (target[end * count] == row + (end - q) * count):
                end += 1
            pass_sum(table_at(table, 0), row, row + (end - q) * count, O, o1 - o0, here, here, 0)
        q = end


@njit
def add_tiles(partial, taps, dweight, c, zero):
    """dweight += the sums of all splits, in order, for 32 input channels: along the rows of dweight, which
    come from memory."""
    (splits, units, _), (_, C, O), T = partial.shape, dweight.shape, taps.shape[0]
    panels = (O + 31) // 32
    for t in range(T):
        for i in range(min(32, C - 32 * c)):
            for o in range(2 * panels):
                run = (taps[t, 2] * C + 32 * c + i) * O + 16 * o
                s = (((c * panels + o // 2) * T + t) * 4 + i // 16 * 2 + o % 2) * 256 + i % 16 * 16
                for split in range(splits):
                    if 16 * o + 16 <= O:
                        sums = at(partial, split * units * STEP + s)
                        add_runs(sums, at(dweight, run), at(zero, 0), at(dweight, run))
                    else:
                        for j in range(O - 16 * o):
                            part = partial[split, s // STEP, s % STEP + j]
                            dweight[taps[t, 2], 32 * c + i, 16 * o + j] += part


@parallel
def gradient_products(
    job, worker, x, dout, source, target, taps, steps, partial, dweight, sums, scratch, zero, tables, numbers
):
    """partial[split, C/32, O/32, tap] = xt^T pairs: a job is one split of the line, for one of `sets` sets of
    input channels. Its rows of dweight lie together: while those of 32 channels are made, the next 32 come.

    Operands are made `chunk` steps of 32 positions at a time, by the thread that multiplies them: from the L2
    cache of another core they would come at a fraction of the rate. Of these, DEEP steps are multiplied for
    all taps before the next ones are, so that they are still in the L1 cache. Sums of a single split are made
    in dweight itself (`there`) where its blocks are whole; `odd`: whether some tap is an odd distance away.
    """
    total, chunk, sets, length, span, area, odd, there = numbers
    C, O, T, (splits, units, _) = x.shape[1], dout.shape[1], taps.shape[0], partial.shape
    lines, blocks, panels = source.shape[0], (C + 31) // 32, (O + 31) // 32
    split, part = job // sets, job % sets
    c0, c1 = part * blocks // sets, (part + 1) * blocks // sets
    o0, o1 = part * panels // sets, (part + 1) * panels // sets  # whose sums of dout it makes
    wide, half = (blocks + sets - 1) // sets, worker * scratch.shape[1]  # wide: of the widest set
    xt = half + wide * 1024
    pairs, d_line = xt + lines * chunk * wide * 1024, panels * 4 * length * 32
    last = (split + 1) * total // splits
    begin()
    for k0 in range(split * total // splits, last, chunk):
        count = min(chunk, last - k0)
        for line in range(lines):
            for k in range(count):
                for i in range(16):
                    q = (k0 + k) * 32 + 2 * i
                    first, second = source[line, q], source[line, q + 1]
                    a = at(x, first * C) if first >= 0 else at(zero, 0)
                    b = at(x, second * C) if second >= 0 else at(zero, 0)
                    for c in range(2 * c0, min(2 * c1, C // 16)):
                        hi = at(scratch, half + (c - 2 * c0) * 512 + i * 16)
                        split_pair(shift(a, c * 16), shift(b, c * 16), hi, shift(hi, 256))
                to = xt + (line * chunk + k) * wide * 1024
                for c in range(2 * (min(2 * c1, C // 16) - 2 * c0)):
                    transpose16(at(scratch, half + c * 256), 16, at(scratch, to + c * 256))
        for line in range(target.shape[0]):
            for e in range(0, count * 32 + span, 2 - odd):
                first, second = target[line, k0 * 32 + e], target[line, k0 * 32 + e + 1]
                a = at(dout, first * O) if first >= 0 else at(zero, 0)
                b = at(dout, second * O) if second >= 0 else at(zero, 0)
                here = pairs + line * d_line + (e % 2 * 2 * length + e // 2) * 16
                for o in range(O // 16):
                    to = at(scratch, here + o * 64 * length)
                    split_pair(shift(a, o * 16), shift(b, o * 16), to, shift(to, 16 * length))
            add_pixels(
                target[line], k0 * 32 + span, (k0 + count) * 32 + span, 1, area, dout, 32 * o0,
                min(32 * o1, O), sums, split, tables[worker],
            )  # fmt: skip
        for c in range(c0, c1):
            for o in range(panels):
                for k in range(0, count, DEEP):
                    depth = min(DEEP, count - k)
                    for t in range(T):
                        line, e = taps[t, 0], taps[t, 1]
                        a = at(scratch, xt + ((line * chunk + k) * wide + c - c0) * 1024)
                        here = pairs + taps[t, 3] * d_line + (4 * o + e % 2) * length * 32
                        b = at(scratch, here + (e // 2 + 16 * k) * 16)
                        unit = at(partial, ((split * units) + (c * panels + o) * T + t) * STEP)
                        to_row, to_half, down = 16, 256, 512
                        if there:
                            unit = at(dweight, (taps[t, 2] * C + c * 32) * O + o * 32)
                            to_row, to_half, down = O, 16, 16 * O
                        soon, apart = at(zero, 0), 0  # 192: the 12 lines for which a step asks
                        if there & (c + 1 < c1):
                            done = (o * count + k) * 32 * O // (panels * count)
                            soon, apart = at(dweight, (taps[t, 2] * C + (c + 1) * 32) * O + done), 192
                        before, row, far, below = unit, to_row, to_half, down
                        if (k0 == split * total // splits) & (k == 0) & (there == 0):
                            before, row, far, below = at(zero, 0), 0, 0, 0
                        tile_product(
                            a, table_at(steps, 0), 16, 256, 512, b, 256, 16, 16 * length, 64 * length,
                            before, shift(before, below), row, far, unit, shift(unit, down), to_row, to_half,
                            depth, soon, apart,
                        )  # fmt: skip
    end()
    if (splits == 1) & (there == 0):
        for c in range(c0, c1):
            add_tiles(partial, taps, dweight, c, zero)


@parallel
def add_gradients(job, worker, partial, taps, dweight, zero):
    add_tiles(partial, taps, dweight, job, zero)


@functools.lru_cache(maxsize=1024)
def _gradient_layout(plan, C, O, area):
    """How `weight_products` cuts its work: a matter of shape alone, since it decides the order of the
    sums."""
    lines, more, T = len(plan.source), len(plan.target), len(plan.taps)
    blocks, panels = -(-C // 32), -(-O // 32)
    total = -(-(plan.n + plan.span) // 32)  # the last outputs look up to `span` further on
    # enough jobs for some threads: sets of 128 input channels or more, each of which makes the operands of
    # all dout; or, where weights are few for its length, splits of the line: no operand is made twice
    if blocks >= 8 and T * blocks * panels > (256 if total >= 32 else 128):
        sets, splits = blocks // 4, 1
    else:
        sets, splits = 1, min(total, 4 if T * blocks * panels <= 256 else 2)
    wide = -(-blocks // sets)
    chunk = min(-(-total // splits), max(4, CHUNK // (1024 * (lines * wide + 2 * more * panels))))
    length = chunk * 16 + (plan.span + 1) // 2 | 1  # odd: not all lines on the same sets of a cache
    words = 1024 * wide * (lines * chunk + 1) + more * panels * 4 * length * 32
    steps = np.arange(chunk, dtype=np.int64) * (wide * 1024)
    odd, there = (plan.taps[:, 1] % 2).any(), splits == 1 and C % 32 == 0 and O % 32 == 0
    numbers = np.array([total, chunk, sets, length, plan.span, area, odd, there], np.int64)
    return sets, (splits, blocks * panels * T, STEP), words, steps, numbers


def weight_products(plan, x, dout, dweight, area):
    """dweight (taps, C, O) += the weight gradient; returns sums of `area` rows of dout each, (groups, O).

    A fixed number of partial sums, added in order: the same bits for any number of threads."""
    (_, C, O), x, dout = dweight.shape, _padded(x), _padded(dout)
    sets, units, size, steps, numbers = _gradient_layout(plan, C, O, area)
    partial = shared("partial", units)
    zero = np.zeros(32 * -(-max(C, O) // 32), np.float32)
    sums = zeros((units[0], -(-len(dout) // area), dout.shape[1]))
    gradient_products(
        units[0] * sets, x, dout, plan.source, plan.target, plan.taps, steps, partial, dweight, sums,
        scratch(size), zero, shared("tables", (parallel_cpu.threads(), 8), np.int64), numbers,
    )  # fmt: skip
    if units[0] > 1:
        add_gradients(-(-C // 32), partial, plan.taps, dweight, zero)
    return sum_first(sums, O)
