"""3x3 'same' convolutions on the matrix unit with half the products: Winograd's F(4, 3) along the rows of an
image (Winograd 1980; Lavin & Gray 2015, arXiv:1509.09308).

Four neighbouring outputs of a row need, of each of the three rows above them, six inputs: 12 products for
each pair of channels. Seen as a product of polynomials they need 6, one for each point p at which the
polynomials are evaluated:
    y = A^T [ (G w) * (B^T x) ],     p in 0, a, -a, b, -b, infinity
so that a convolution becomes, for each point or "frequency" p, one with three taps (the rows) on images a
quarter as wide. What amx_cpu.py says of lines and distances holds for each: position q of line p is tile
(image, row, column / 4), and the rows are distances of 0, 1 and 2 rows of tiles. Between images lies a row
of zeros; beside them nothing, the tiles overlap.

Why along rows alone, and why these points? Errors of bfloat16 pairs are relative to the terms of a sum, and
the terms are larger than the sum: of independent inputs and weights of variance 1, the error of output j
grows by
    sqrt( sum over p of A[p, j]^2 |B[p]^2| |G[p]^2| / 3 ),
1.3 for F(2, 3); for F(4, 3) 3.3 with the usual points 1 and 2 but 2.2 with 5/8 and 3/2 (the best, 0.66 and
1.54, are no better to two digits). So 4.4e-6 becomes 9.7e-6 to 9.9e-6, and 1.0e-5 in images of 8 x 8, where
outputs at the border have fewer terms: there conv_cpu.py takes another way. F(4x4, 3x3), in both directions,
would have twice that again. F(2x2, 3x3) has 7.3e-6 and 2.25 times fewer products, but makes four values of
every pixel, each as long to split as to multiply, where this makes 1.5.

The backward: dx is the same convolution of dout with the weights turned by 180 degrees and their channels
exchanged. y is linear in U = G w, so with V = B^T x and D = A dy, for each row i of the window,
    dU[p, i] = sum over q of V[p, q + i rows]^T D[p, q],     dw[i] = G^T dU[., i].
C and O are multiples of 32.
"""

import functools

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.amx_cpu import add_pixels
from nanodiff.kernels.parallel_cpu import empty, njit, parallel, scratch, shared
from nanodiff.kernels.simd_cpu import at, prefetch, shift, table_at
from nanodiff.kernels.sums_cpu import sum_first, zeros
from nanodiff.kernels.tiles_cpu import (
    BIAS,
    ENTRY,
    ENTRY_SIZE,
    INPUTS,
    LO,
    MORE,
    OWN,
    PANEL,
    RESULTS,
    SKIP,
    STEP_M,
    STEP_R,
    SUMS,
    SUMS_LINE,
    WORDS_LINE,
    WORDS_TO,
    begin,
    end,
    make_beside,
    make_merge,
    make_split,
    tile_product,
    transpose16,
)

STEP = 1024  # words of B for one step of tile_product
F = 6  # frequencies
TABLE = 32 * 6 + 8  # addresses of a worker: of the inputs of 32 positions, and one more
NONE = np.zeros(0, np.float32)
FRAME = 3 << 16  # words of a frame, 768 KB of a 2 MB L2 cache, unless those are fewer than 8 tiles
SMALL = 1 << 14  # C * O of weights that stay in the L2 cache: 1.2 MB
DEEP = 4, 6  # steps whose weights stay in L1 while they meet all tiles of a job; 6 where 4 would leave a rest
CHUNK = 4  # steps of 32 positions of a weight gradient whose operands are made at a time
SET = 4  # a job of it makes SET x SET blocks of 32 x 32 channels, whose sums, 1.2 MB, stay in the L2 cache
ROOM = 8  # blocks whose sums leave room there for the pixels of the next chunk, asked for in advance

PA, PB = 5 / 8, 3 / 2  # the points
A2, B2 = PA * PA, PB * PB
GA, GB = 1 / (2 * A2 * (A2 - B2)), 1 / (2 * B2 * (B2 - A2))


# The 1-D transforms, on SIMD registers or NumPy arrays. Row p of B^T is the polynomial with the roots of the
# other points, row p of G is 1, p, p^2 divided by that polynomial at p, column p of A^T is 1, p, p^2, p^3.
def bt(d0, d1, d2, d3, d4, d5):  # B^T: 6 inputs
    p, q, r, s = d4 - B2 * d2, d3 - B2 * d1, d4 - A2 * d2, d3 - A2 * d1
    ends = [A2 * B2 * x - (A2 + B2) * y + z for x, y, z in ((d0, d2, d4), (d1, d3, d5))]
    return ends[0], p + PA * q, p - PA * q, r + PB * s, r - PB * s, ends[1]


def at4(m0, m1, m2, m3, m4, m5):  # A^T: 6 products to 4 outputs
    s, d, t, e = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return m0 + s + t, PA * d + PB * e, A2 * s + B2 * t, PA * A2 * d + PB * B2 * e + m5


def a4(y0, y1, y2, y3):  # A, the adjoint of A^T: 4 output gradients to 6
    p, q, r, s = y0 + A2 * y2, PA * y1 + PA * A2 * y3, y0 + B2 * y2, PB * y1 + PB * B2 * y3
    return y0, p + q, p - q, r + s, r - s, y3


def g(w0, w1, w2):  # G: 3 weights to 6
    p, q, r, s = GA * w0 + GA * A2 * w2, GA * PA * w1, GB * w0 + GB * B2 * w2, GB * PB * w1
    return (1 / (A2 * B2)) * w0, p + q, p - q, r + s, r - s, w2


def gt(u0, u1, u2, u3, u4, u5):  # G^T, the adjoint of G
    s, d, t, e = u1 + u2, u1 - u2, u3 + u4, u3 - u4
    return (1 / (A2 * B2)) * u0 + GA * s + GB * t, GA * PA * d + GB * PB * e, GA * A2 * s + GB * B2 * t + u5


PARTS = slice(None), slice(3), slice(3, 6)  # all frequencies, or a half of them
split_x, split_w, split_d = make_split(bt, 6, PARTS), make_split(g, 3), make_split(a4, 4, PARTS)
merge_w, (product_beside, split_alone, merge_alone) = make_merge(gt, F), make_beside(bt, at4)


@functools.lru_cache(maxsize=256)
def row_plan(B, H, W):
    """Where everything is, for images of H x W.

    P tiles in a row, n positions of outputs; source[q, j]: the pixel that input j of position q is, -1 for
    zero; starts[t]: the first position of each 16 outputs, an even number of them; rows[16 t + i]: the first
    of the four pixels that position starts[t] + i makes, -1 for none; target[q, j]: pixel j of position
    q - 2P, for the weight gradient.
    """
    P = W // 4
    n = B * (H + 1) * P
    source, target = np.full((n + 2 * P + 64, 6), -1), np.full((n + 4 * P + 160, 4), -1)
    x = 4 * np.arange(P)[:, None] + np.arange(-1, 5)
    pixels = np.where((x >= 0) & (x < W), np.arange(B * H).reshape(B, H, 1, 1) * W + x, -1)
    source[:n].reshape(B, H + 1, P, 6)[:, 1:] = pixels
    target[2 * P : 2 * P + n].reshape(B, H + 1, P, 4)[:, :H] = pixels[..., 1:5]
    if H * P >= 16:  # 16 positions at a time of each image, the last ones end with it
        starts = np.arange(B)[:, None] * (H + 1) * P + np.minimum(np.arange(0, H * P, 16), H * P - 16)
    else:
        starts = np.arange(0, n, 16)
    starts = np.append(starts, starts.flat[-1:].repeat(starts.size % 2)).astype(np.int32)
    rows = target[2 * P + starts[:, None] + np.arange(16), 0]
    return P, n, source, starts, rows.ravel(), target


@njit
def point(to, pixels, n, base, size, none):
    """to[j] = the address of pixel pixels[j], j < n, of `size` bytes each from `base` on; `none` for -1."""
    for j in range(n):
        to[j] = base + pixels[j] * size if pixels[j] >= 0 else none


@functools.lru_cache
def _zeros(n):
    return np.zeros(n + 32, np.float32)


# ---- y and dx ----
# What a job does beside its products is in a table: first what product_beside reads (tiles_cpu.py), then rows
# left to merge and positions left to split; the blocks of 32 channels of one; bytes in the frame from one
# block to the next, and from the last one back to the next position; the sink, where work goes that nobody
# needs, and the entries of that; then lists of entries and of addresses, so that no step has to decide
# anything: a wrong guess of the processor costs the unit its queue.
LEFT, TO_SPLIT, BLOCKS, NEXT, BACK, SINK, NO_INPUTS, NO_ENTRY, FREE = *range(9, 17), 40


@njit(inline=True)
def merged(todo):
    """On to the next row of a panel's tiles: four pixels of the output, 32 channels of each."""
    todo[LEFT] -= 1
    todo[ENTRY] = todo[ENTRY] + 8 * ENTRY_SIZE if todo[LEFT] > 0 else todo[NO_ENTRY]


@njit(inline=True)
def was_split(todo):
    """On to the next block of 32 channels of a position."""
    todo[SKIP] += 32
    todo[WORDS_TO] += todo[NEXT]
    if todo[SKIP] == todo[BLOCKS] * 32:
        todo[SKIP], todo[TO_SPLIT] = 0, todo[TO_SPLIT] - 1
        todo[WORDS_TO] += todo[BACK]
        todo[INPUTS] += 8 * 8
        if todo[TO_SPLIT] == 0:
            todo[INPUTS], todo[WORDS_TO], todo[WORDS_LINE], todo[LO] = todo[NO_INPUTS], todo[SINK], 0, 16


@njit
def on(todo):
    if todo[LEFT] > 0:
        merged(todo)
    if todo[TO_SPLIT] > 0:
        was_split(todo)


@njit
def merge_rest(todo):
    while todo[LEFT] > 0:
        merge_alone(todo)
        merged(todo)


@njit
def split_rest(todo):
    while todo[TO_SPLIT] > 0:
        split_alone(todo)
        was_split(todo)


@parallel
def row_products(
    job, worker, x, source, weight, steps, starts, rows, bias, residual, out, zero, scratch, tables, numbers
):
    """A job: `share` tiles, `block` of them at a time, one of `groups` groups of output channels. Beside the
    products of a panel the sums of the panel before are merged, and the frame of the next tiles is made."""
    share, block, parts, P, length, groups, area = numbers
    C, O, tiles = x.shape[1], out.shape[1], starts.shape[0]
    first, group, blocks, panels = job // groups * share, job % groups, C // 32, O // 32
    last, table, flat = min(first + share, tiles), tables[worker], scratch.reshape(-1)
    line, base, turn, plus = blocks * length * 32, worker * scratch.shape[1], 0, residual.size > 0
    lo, deep = length * 16, DEEP[int(3 * blocks % DEEP[0] > 0)]
    ask = int(4 * C * O > SMALL)  # for weights in advance; the few of fewer channels are near anyway
    todo, sums = table_at(tables, worker * tables.shape[1]), base + min(2, parts) * F * line
    lists = tables.ctypes.data + worker * tables.shape[1] * 8
    nothing, sink = zero.ctypes.data, scratch.ctypes.data + (base + scratch.shape[1] - O - 32) * 4
    table[LEFT], table[TO_SPLIT], table[BLOCKS], table[NEXT] = 0, 0, blocks, length * 128
    table[BACK], table[SINK], table[SUMS], table[SUMS_LINE] = 64 - blocks * length * 128, sink, nothing, 0
    table[NO_ENTRY], table[NO_INPUTS], table[LO] = lists + 8 * 24, lists + 8 * 32, 16
    for i in range(8):
        table[24 + i], table[32 + i] = 0, nothing
    table[24 + RESULTS], table[24 + MORE], table[24 + BIAS] = sink, nothing, nothing
    table[ENTRY], table[INPUTS], table[SKIP], table[PANEL] = table[NO_ENTRY], table[NO_INPUTS], 0, 0
    for part in range(-1, (last - first + block - 1) // block):  # -1: nothing but the first frame
        t0 = first + part * block
        t1, t2, frame = min(t0 + block, last), min(t0 + 2 * block, last), base + part % 2 * F * line
        split_rest(todo)
        if t1 < t2:
            count, inputs = starts[t2 - 1] + 16 + 2 * P - starts[t1], FREE + 32 * block * ENTRY_SIZE
            for i in range(count):
                for j in range(6):
                    pixel = source[starts[t1] + i, j]
                    table[inputs + 8 * i + j] = x.ctypes.data + pixel * C * 4 if pixel >= 0 else nothing
            table[TO_SPLIT], table[INPUTS], table[WORDS_LINE] = count, lists + 8 * inputs, line
            table[LO] = lo
            table[WORDS_TO] = scratch.ctypes.data + (base + (part + 1) % 2 * F * line) * 4
        if part < 0:
            continue
        entries = FREE + part % 2 * 16 * block * ENTRY_SIZE
        for i in range((t1 - t0) * 16):
            row, here = rows[t0 * 16 + i], entries + i * ENTRY_SIZE
            image = row // area if bias.shape[0] > 1 else 0
            table[here + OWN] = (i // 16 * 512 + i % 16 * 16) * 4
            table[here + RESULTS], table[here + STEP_R] = sink, 0
            table[here + MORE], table[here + STEP_M], table[here + BIAS] = nothing, 0, nothing
            if row >= 0:
                table[here + RESULTS], table[here + STEP_R] = out.ctypes.data + row * O * 4, O
                table[here + BIAS] = bias.ctypes.data + image * O * 4
                if plus:
                    table[here + MORE], table[here + STEP_M] = residual.ctypes.data + row * O * 4, O
        begin()
        for o in range(group * panels // groups, (group + 1) * panels // groups):
            now, turn = sums + turn * F * block * 512, 1 - turn  # while those of the panel before are merged
            for f in range(F):
                for k in range(0, 3 * blocks, deep):
                    panel = at(weight, ((o * F + f) * blocks * 3 + k) * STEP)
                    depth = min(deep, 3 * blocks - k)
                    for t in range(t0, t1, 2):
                        a = at(flat, frame + f * line + (starts[t] - starts[t0]) * 16)
                        far = (starts[t + 1] - starts[t]) * 16
                        # the next weights come meanwhile
                        soon = shift(panel, ask * (STEP + (t - t0) // 2 * 192) * depth)
                        to = at(flat, now + (f * block + t - t0) * 512)
                        before, row, half, below = to, 16, 256, 512
                        if k == 0:
                            before, row, half, below = at(zero, 0), 0, 0, 0
                        if (table[LEFT] > 0) | (table[TO_SPLIT] > 0):
                            product_beside(
                                on, todo, a, table_at(steps, k), 16, lo, far, panel, STEP, 16, 256, 512,
                                before, shift(before, below), row, half, to, shift(to, 512), 16, 256, depth,
                                soon, 192,
                            )  # fmt: skip
                        else:
                            tile_product(
                                a, table_at(steps, k), 16, lo, far, panel, STEP, 16, 256, 512,
                                before, shift(before, below), row, half, to, shift(to, 512), 16, 256, depth,
                                soon, 192,
                            )  # fmt: skip
            merge_rest(todo)
            table[LEFT], table[ENTRY], table[PANEL] = (t1 - t0) * 16, lists + 8 * entries, o * 128
            table[SUMS], table[SUMS_LINE] = scratch.ctypes.data + now * 4, block * 512
        end()
    merge_rest(todo)


@functools.lru_cache(maxsize=1024)
def _layout(B, H, W, C, O, threads):
    """How `row_conv` cuts its work: number of jobs, words of scratch, tables. It changes no bit of it."""
    P, _, _, starts, _, _ = row_plan(B, H, W)
    blocks, tiles, small = C // 32, len(starts), C * O <= SMALL
    most = max(4 if small else 8, (FRAME // 3 if small else FRAME) // (F * C * 16) // 2 * 2)
    # small weights stay in the L2 cache while a job makes some parts, and frames of the next beside products;
    # large ones pass through it once for each part, asked for in advance: parts had better be few, and time
    # enough for that
    parts = max(1, min(8, tiles // (2 * threads * most))) if small else 1
    count = -(-tiles // (parts * most))
    count = -(-count // threads) * threads if tiles >= 16 * threads else 1
    share = -(-tiles // count // 2) * 2
    count, block = -(-tiles // share), -(-share // parts // 2) * 2
    groups = min(threads, O // 32) if count < threads else 1
    length = 16 + 2 * P + max(
        int(starts[min(t + block, tiles) - 1] - starts[t]) for t in range(0, tiles, 2)
    ) | 1  # fmt: skip
    steps = [(c * 2 * length + i * P) * 16 for c in range(blocks) for i in range(3)]
    numbers = np.array([share, block, parts, P, length, groups, H * W], np.int64)
    words = F * (C * length * min(2, parts) + block * STEP) + O + 64
    return (
        count * groups,
        words,
        FREE + 32 * block * ENTRY_SIZE + 8 * length * 2,
        np.array(steps, np.int64),
        numbers,
    )


def row_conv(x, weight, bias, residual=None):  # (B,H,W,C), row_weights, (1 or B, O) -> (B,H,W,O)
    (B, H, W, C), O, threads = x.shape, bias.shape[1], parallel_cpu.threads()
    out, (_, _, source, starts, rows, _) = empty((B, H, W, O)), row_plan(B, H, W)
    jobs, words, size, steps, numbers = _layout(B, H, W, C, O, threads)
    tables = shared("tables", (threads, size), np.int64)
    row_products(
        jobs, x.reshape(-1, C), source, weight, steps, starts, rows, bias,
        NONE if residual is None else residual.reshape(-1), out.reshape(-1, O), _zeros(max(C, O)),
        scratch(words), tables, numbers,
    )  # fmt: skip
    return out


@parallel
def split_rows(job, worker, weight, turned, out, scratch, tables):
    """out[panel, f, c block, row] = G w as tiles of B; a job is 32 rows of all taps, from left to right:
    weights come from memory, in its order, some ahead of their use."""
    _, C, O = weight.shape
    wide, row, table, spare = O // 32, O * 4, tables[worker], scratch[worker]
    blocks = wide if turned else C // 32
    for u in range(3 * wide):
        i, column, later = u // wide, u % wide * 32, u + 1
        for j in range(3 if later < 3 * wide else 0):
            tap = 3 * (later // wide) + j
            for k in range(32):
                first = ((8 - tap if turned else tap) * C + job * 32 + k) * O
                prefetch(at(weight, first + later % wide * 32), 32)
        panel, c = (job, u % wide) if turned else (u % wide, job)
        base = weight.ctypes.data + (job * 32 * O + column) * 4
        if turned:  # exchange channels in the cache first, then as below
            for j in range(3):
                block = at(weight, ((8 - 3 * i - j) * C + job * 32) * O + column)
                for k in range(4):
                    to = at(spare, j * 1024 + k * 256)
                    transpose16(shift(block, k // 2 * 16 * O + k % 2 * 16), O, to)
        for h in range(2):
            for k in range(16):
                for j in range(3):
                    if turned:  # k + 16 h' of the sum, 16 h of the columns: block (h, h'), row k
                        first = spare.ctypes.data + (j * 1024 + h * 512 + k * 16) * 4
                        table[j], table[3 + j] = first, first + 1024
                    else:
                        first = base + (3 * i + j) * C * row + k * row + h * 64
                        table[j], table[3 + j] = first, first + 16 * row
                to = at(out, ((panel * F * blocks + c) * 3 + i) * STEP + h * 512 + k * 16)
                split_w(0, table_at(tables, worker * TABLE), 1, 0, 0, to, 0, blocks * 3 * STEP, 256)


def row_weights(weight, turned=False, keep=False):  # (3,3,C,O) -> (panels, 6, 3 * blocks, STEP)
    C, O = weight.shape[2:]
    blocks, panels = (O // 32, C // 32) if turned else (C // 32, O // 32)
    shape = panels, F, 3 * blocks, STEP
    out = empty(shape) if keep else shared("weights", shape)
    split_rows(
        C // 32, weight.reshape(9, C, O), int(turned), out, scratch(3072),
        shared("tables", (parallel_cpu.threads(), TABLE), np.int64),
    )  # fmt: skip
    return out


# ---- dweight ----
@njit
def add_rows(partial, dweight, c, o0, o1, zero):
    """dweight += G^T dU of all splits, in order, for 32 input channels and the panels o0 .. o1."""
    (splits, units, _), (_, C, O) = partial.shape, dweight.shape
    panels = O // 32
    for i in range(3):
        for k in range(32):
            for o in range(o0, o1):
                to = at(dweight, ((3 * i * C) + c * 32 + k) * O + o * 32)
                for split in range(splits):
                    unit = (split * units + (c * panels + o) * F * 3 + i) * STEP
                    m = at(partial, unit + k // 16 * 512 + k % 16 * 16)
                    merge_w(m, 3 * STEP, 256, to, C * O, to, C * O, at(zero, 0))


@parallel
def row_gradients(
    job, worker, x, dout, source, target, partial, dweight, sums, zero, steps, scratch, tables, numbers
):
    """partial[split, c block, panel, f, row] = V^T D: a job is one split of the positions, for a set of SET
    blocks of input channels, one of SET panels, and all frequencies or one of `halves`."""
    total, P, csets, osets, halves, area = numbers
    C, O, (splits, units, _) = x.shape[1], dout.shape[1], partial.shape
    blocks, panels, inputs, table = (
        C // 32,
        O // 32,
        table_at(tables, worker * TABLE),
        tables[worker, TABLE - 8 :],
    )
    half, job, lines = job % halves, job // halves, F // halves
    split, cset, oset = job // (csets * osets), job // osets % csets, job % osets
    c0, c1 = cset * blocks // csets, (cset + 1) * blocks // csets
    o0, o1 = oset * panels // osets, (oset + 1) * panels // osets
    odd, length = P % 2, CHUNK * 16 + P  # pairs of positions: an odd distance needs those from odd ones on
    words, to_next = worker * scratch.shape[1], (1 + odd) * length * 32
    xt, x_line = words + lines * 512, (c1 - c0) * CHUNK * STEP + 16
    pairs, d_line = xt + lines * x_line, 2 * (o1 - o0) * to_next + 16
    first, last, part = split * total // splits, (split + 1) * total // splits, half + halves // 2
    chunks, calls = (last - first + CHUNK - 1) // CHUNK, (c1 - c0) * (o1 - o0) * lines * 3
    roomy = calls <= ROOM * F * 3  # one call of tile_product for each sum
    begin()
    for chunk in range(chunks):
        k0, call = first + chunk * (last - first) // chunks, 0
        count = first + (chunk + 1) * (last - first) // chunks - k0
        for k in range(count):
            pixels = table_at(source, (k0 + k) * 32 * 6)
            point(inputs, pixels, 32 * 6, x.ctypes.data, C * 4, zero.ctypes.data)
            for c in range(2 * c0, 2 * c1):
                for i in range(16):
                    pair = table_at(tables, worker * TABLE + 12 * i)
                    split_x(part, pair, 1, 16 * c, 0, at(scratch, words + i * 16), 0, 512, 256)
                to = xt + ((c // 2 - c0) * CHUNK + k) * STEP + c % 2 * 512
                for i in range(2 * lines):
                    tile = at(scratch, to + i // 2 * x_line + i % 2 * 256)
                    transpose16(at(scratch, words + i * 256), 16, tile)
        for e in range(0, count * 32 + 2 * P, 2 - odd):
            point(inputs, table_at(target, (k0 * 32 + e) * 4), 8, dout.ctypes.data, O * 4, zero.ctypes.data)
            to = at(scratch, pairs + (e % 2 * 2 * length + e // 2) * 16)
            split_d(part, inputs, 2 * (o1 - o0), 32 * o0, 16, to, to_next, d_line, 16 * length)
        if cset + half == 0:
            q = k0 * 32 + 2 * P
            add_pixels(
                target.reshape(-1), q, q + count * 32, 4, area, dout, 32 * o0, 32 * o1, sums, split, table
            )
        later = (k0 + count) * 32 * 4 * area // (area + 4 * P)  # about the first pixel of the next chunk
        for c in range(c0, c1):
            for o in range(o0, o1):
                for f in range(lines):
                    a = at(scratch, xt + f * x_line + (c - c0) * CHUNK * STEP)
                    for i in range(3):
                        e, unit = (2 - i) * P, ((c * panels + o) * F + half * lines + f) * 3 + i
                        unit = (split * units + unit) * STEP
                        d = pairs + f * d_line + 2 * (o - o0) * to_next + (e % 2 * 2 * length + e // 2) * 16
                        to, before, row, far = at(partial, unit), at(partial, unit), 16, 256
                        if k0 == first:
                            before, row, far = at(zero, 0), 0, 0
                        # meanwhile pixels of the next chunk come, of x and then of dout, or the next sums
                        pixel = later + 2 * call % calls * 128 * count // calls
                        if not roomy:
                            soon, apart = shift(to, STEP), 256
                        elif 2 * call < calls:
                            soon, apart = at(x, pixel * C + 32 * c0), C * -(-256 // calls)
                        else:
                            soon, apart = at(dout, pixel * O + 32 * o0), O * -(-256 // calls)
                        call += 1
                        tile_product(
                            a, table_at(steps, 0), 16, 256, 512, at(scratch, d), 256, 16, 16 * length,
                            to_next, before, shift(before, 2 * far), row, far, to, shift(to, 512), 16, 256,
                            count, soon, apart,
                        )  # fmt: skip
    end()
    if splits * halves == 1:
        for c in range(c0, c1):
            add_rows(partial, dweight, c, o0, o1, zero)


@parallel
def add_splits(job, worker, partial, dweight, zero):
    add_rows(partial, dweight, job, 0, dweight.shape[2] // 32, zero)


def row_weight_gradient(x, dout, dweight):
    """dweight (3,3,C,O) += the weight gradient; returns the sums of dout over each image, (B, O).

    A fixed number of partial sums, added in order: the same bits for any number of threads."""
    (B, H, W, C), O, threads = x.shape, dout.shape[3], parallel_cpu.threads()
    P, n, source, _, _, target = row_plan(B, H, W)
    total, csets, osets = -(-(n + P) // 32), -(-C // (32 * SET)), -(-O // (32 * SET))
    wide, high = -(-C // 32 // csets), -(-O // 32 // osets)
    # each half of the frequencies apart: x and dout are read twice, but fewer splits make as many jobs
    halves = 2 if wide * high > ROOM and csets * osets < 3 else 1
    parts = csets * osets * halves
    splits = 1 if parts > 3 else min(total, 4 if parts == 1 else 2)
    pairs = 2 * high * (1 + P % 2) * (CHUNK * 16 + P) * 32
    words = F // halves * (512 + wide * CHUNK * STEP + 16 + pairs + 16)
    partial = shared("partial", (splits, C // 32 * (O // 32) * F * 3, STEP))
    sums, flat, zero = zeros((splits, B, O)), dweight.reshape(9, C, O), _zeros(max(C, O))
    row_gradients(
        splits * parts, x.reshape(-1, C), dout.reshape(-1, O), source, target, partial, flat, sums,
        zero, np.arange(CHUNK) * STEP, scratch(words), shared("tables", (threads, TABLE), np.int64),
        np.array([total, P, csets, osets, halves, H * W], np.int64),
    )  # fmt: skip
    if splits * halves > 1:
        add_splits(C // 32, partial, flat, zero)
    return sum_first(sums, O)
