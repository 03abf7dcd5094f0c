"""3x3 'same' convolutions by Winograd's F(4x4, 3x3) on the CPU (Lavin & Gray 2015, arXiv:1509.09308).

A tile of 4x4 outputs needs 6x6 inputs: 144 multiplications for each pair of channels. Seen as a product of
polynomials it needs only 36:
    y = A^T [ (G w G^T) * (B^T x B) ] A            * element by element: 36 "frequencies"
Each frequency is a matrix product over channels, [tiles, C] @ [C, O]: four times less work than the
convolution, plus transforms that grow with C + O instead of C * O. The price is accuracy (the constants reach
8): about 3e-6 relative RMS in float32, ten times a direct sum.

The backward needs nothing new. dx is the same convolution of dout with the weights turned by 180 degrees and
with their channels exchanged. For the weights, y_tile is linear in U = G w G^T, so with V = B^T x B and
D = A dy A^T (the adjoint of "A^T . A"):
    dU[f] = sum over tiles of V[f]^T D[f],     dw = G^T dU G
C and O must be multiples of 16. Every table of addresses below says where the pixels of a tile are: borders
are entries that point to a row of zeros (or, for outputs, to a row that nobody reads).
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, njit, parallel
from nanodiff.kernels.simd_cpu import PANEL, ROWS, ROWS_T, WIDE, at, make_product, make_transform, table_at

# Steps between long rows, and between frequencies, are an odd number of cache lines (of PAD floats): an even
# one would put what is 36 apart into a few sets of the cache, and a transform writes to 36 places at a time.
PAD = 16
TILES = 24  # tiles transformed at a time, whole ROWS: their 36 * TILES * C values stay in the L2 cache
GROUP = 64  # output channels multiplied at a time
BLOCK = 64  # a weight gradient is made for BLOCK x BLOCK channels at a time,
CHUNK = 48  # from so many tiles at a time: the operands and the sum, 1.5 MB, stay in the L2 cache


# The five 1-D transforms. They run on NumPy arrays and, through make_transform, on SIMD registers.
def bt(d0, d1, d2, d3, d4, d5):  # B^T: 6 inputs
    p, q = d4 - 4 * d2, d3 - 4 * d1
    r, s = d4 - d2, 2 * (d3 - d1)
    return 4 * d0 - 5 * d2 + d4, p + q, p - q, r + s, r - s, 4 * d1 - 5 * d3 + d5


def at4(m0, m1, m2, m3, m4, m5):  # A^T: 6 products to 4 outputs
    s, d, s2, d2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return m0 + s + s2, d + 2 * d2, s + 4 * s2, d + 8 * d2 + m5


def a4(y0, y1, y2, y3):  # A, the adjoint of A^T: 4 output gradients to 6
    e, o, e4, o2 = y0 + y2, y1 + y3, y0 + 4 * y2, 2 * y1 + 8 * y3
    return y0, e + o, e - o, e4 + o2, e4 - o2, y3


def g(w0, w1, w2):  # G: 3 weights to 6
    s, t, u = (1 / 6) * (w0 + w2), (1 / 24) * w0 + (1 / 6) * w2, (1 / 12) * w1
    return (1 / 4) * w0, -s - (1 / 6) * w1, (1 / 6) * w1 - s, t + u, t - u, w2


def gt(u0, u1, u2, u3, u4, u5):  # G^T, the adjoint of G
    s, d, s2, d2 = u1 + u2, u1 - u2, u3 + u4, u3 - u4
    return (1 / 4) * u0 - (1 / 6) * s + (1 / 24) * s2, (1 / 12) * d2 - (1 / 6) * d, (1 / 6) * (s2 - s) + u5


product, products = make_product(ROWS), make_product(ROWS, panels=WIDE)
product_t, products_t = (make_product(ROWS_T, transposed=True, panels=n) for n in (1, WIDE))
to_v, to_d, to_u = make_transform(bt, 6), make_transform(a4, 4), make_transform(g, 3)
to_y, to_y_plus = (make_transform(at4, 6, back=True, bias=True, residual=plus) for plus in (False, True))
to_dw = make_transform(gt, 6, back=True, add=True)


@njit
def pixels(table, image, size, start, tile, H, W, C, outside):
    """Addresses of the size x size pixels of a tile, from (4 ty + start, 4 tx + start) on; `outside` beyond H
    x W."""
    th, tw = (H + 3) // 4, (W + 3) // 4
    n, y, x = tile // (th * tw), tile // tw % th * 4 + start, tile % tw * 4 + start
    corner = image + ((n * H + y) * W + x) * C * 4
    if (y >= 0) & (x >= 0) & (y + size <= H) & (x + size <= W):
        for i in range(size):
            for j in range(size):
                table[i * size + j] = corner + (i * W + j) * C * 4
    else:
        for i in range(size):
            inside = (y + i >= 0) & (y + i < H)
            for j in range(size):
                here = corner + (i * W + j) * C * 4
                table[i * size + j] = here if inside & (x + j >= 0) & (x + j < W) else outside


@njit
def block_v(x, V, t0, tn, c0, c1, table, zero):
    """V[f, i] = B^T x B of the tiles t0 + i, i < tn, for the channels c0 .. c1."""
    _, H, W, C = x.shape
    for i in range(tn):
        pixels(table, x.ctypes.data + c0 * 4, 6, -1, t0 + i, H, W, C, zero.ctypes.data)
        to_v(table_at(table, 0), at(V, i * V.shape[2]), V.shape[1] * V.shape[2], c1 - c0, at(zero, 0))


@njit
def block_y(V, U, out, bias, residual, t0, tn, k0, k1, M, table, zero, trash):
    """Channels k0 .. k1 of tiles t0 .. t0 + tn of out: 36 products into M, then A^T . A, bias and
    residual."""
    _, H, W, O = out.shape
    C, ldv, wide, rows = U.shape[2] - 1, V.shape[2], k1 - k0, (tn + ROWS - 1) // ROWS * ROWS
    stride = rows * wide + PAD
    tiles = ((H + 3) // 4) * ((W + 3) // 4)
    for f in range(36):
        for k in range(0, wide, PANEL * WIDE):
            u = at(U, ((k0 + k) // PANEL * 36 + f) * (C + 1) * PANEL)
            for r in range(0, rows, ROWS):
                v, m = at(V, (f * V.shape[1] + r) * ldv), at(M, f * stride + r * wide + k)
                if k + PANEL * WIDE <= wide:
                    products(v, ldv, u, PANEL, m, wide, C, 0, 36 * (C + 1) * PANEL, PANEL)
                else:
                    product(v, ldv, u, PANEL, m, wide, C, 0)
    for i in range(tn):
        pixels(table, out.ctypes.data + k0 * 4, 4, 0, t0 + i, H, W, O, trash.ctypes.data)
        b = at(bias, ((t0 + i) // tiles if bias.shape[0] > 1 else 0) * O + k0)
        if residual.size:
            pixels(table[16:], residual.ctypes.data + k0 * 4, 4, 0, t0 + i, H, W, O, zero.ctypes.data)
            to_y_plus(table_at(table, 0), at(M, i * wide), stride, wide, b)
        else:
            to_y(table_at(table, 0), at(M, i * wide), stride, wide, b)


@parallel
def tiles_forward(job, worker, x, U, bias, residual, out, V, M, tables, zeros, count, groups):
    """A job: one of `count` blocks of TILES tiles, one of `groups` groups of output channels; V and M are
    private to a worker."""
    N, H, W, O = out.shape
    T = N * ((H + 3) // 4) * ((W + 3) // 4)
    t0, group = job % count * TILES, job // count
    tn = min(TILES, T - t0)
    table, zero, trash = tables[worker], zeros[worker, 0], zeros[worker, 1]
    zero[:] = 0
    block_v(x, V[worker], t0, tn, 0, x.shape[3], table, zero)
    k1 = (group + 1) * (O // PANEL) // groups * PANEL
    for k in range(group * (O // PANEL) // groups * PANEL, k1, GROUP):
        wide = min(k + GROUP, k1)
        block_y(V[worker], U, out, bias, residual, t0, tn, k, wide, M[worker], table, zero, trash)


@parallel
def weights_forward(job, worker, weight, U, tables):
    """U[panel, f, c] = G w G^T for the panel's 16 output channels, c < C, and one row more as padding; a job
    does 16 input channels of a panel."""
    _, C, O = weight.shape
    k, c0 = job // (C // PANEL), job % (C // PANEL) * PANEL
    table = tables[worker]
    for c in range(c0, c0 + PANEL):
        for i in range(9):
            table[i] = weight.ctypes.data + ((i * C + c) * O + k * PANEL) * 4
        to_u(table_at(table, 0), at(U, (k * 36 * (C + 1) + c) * PANEL), (C + 1) * PANEL, PANEL, at(U, 0))


@parallel
def weights_turned(job, worker, weight, U, tables, blocks):
    """The same for dx: taps turned by 180 degrees, input and output channels exchanged, 16 x 16 channels at a
    time."""
    _, C, O = weight.shape
    c, k = job // (O // PANEL), job % (O // PANEL)
    table, block = tables[worker], blocks[worker].reshape(9, PANEL, PANEL)
    for i in range(9):
        table[i] = block.ctypes.data + i * PANEL * PANEL * 4
        for p in range(PANEL):
            for q in range(PANEL):
                block[i, q, p] = weight[8 - i, c * PANEL + p, k * PANEL + q]
    to_u(
        table_at(table, 0),
        at(U, (c * 36 * (O + 1) + k * PANEL) * PANEL),
        (O + 1) * PANEL,
        PANEL * PANEL,
        at(U, 0),
    )


@njit
def channels(block, C, O):
    """Which channels belong to a block of a weight gradient: c0, c1 of the inputs, o0, o1 of the outputs."""
    across = (O + BLOCK - 1) // BLOCK
    c0, o0 = block // across * BLOCK, block % across * BLOCK
    return c0, min(C, c0 + BLOCK), o0, min(O, o0 + BLOCK)


@njit
def add_gradient(dU, dweight, block, table):
    """dweight += G^T dU G for a block of channels: dU[f, c, o], padded to a step of `stride` from f to f."""
    _, C, O = dweight.shape
    c0, c1, o0, o1 = channels(block, C, O)
    wide = o1 - o0
    for c in range(c0, c1):
        for i in range(9):
            table[i] = dweight.ctypes.data + ((i * C + c) * O + o0) * 4
        to_dw(table_at(table, 0), at(dU, (c - c0) * wide), (c1 - c0) * wide + PAD, wide, at(dU, 0))


@parallel
def tiles_gradient(job, worker, x, dout, sums, dweight, V, D, tables, zeros, splits):
    """dU[f] = sum over the tiles of V[f]^T D[f]: a job is one of `splits` splits of the tiles, for a block of
    channels.

    The thread that multiplies V and D makes them itself, once for every block: from the L2 cache of another
    core they would come at a fraction of the rate. Of a single split it goes on to dweight.
    """
    _, H, W, O = dout.shape
    C, T = x.shape[3], dout.shape[0] * ((H + 3) // 4) * ((W + 3) // 4)
    block, split = job // splits, job % splits
    c0, c1, o0, o1 = channels(block, C, O)
    high, wide, first, last = c1 - c0, o1 - o0, split * T // splits, (split + 1) * T // splits
    v, d, table, zero = V[worker], D[worker], tables[worker], zeros[worker]
    (_, rows, ldv), ldd, dU = v.shape, d.shape[2], sums[worker if splits == 1 else job]
    zero[:] = 0
    for t0 in range(first, last, CHUNK):
        tn, add = min(CHUNK, last - t0), int(t0 > first)
        block_v(x, v, t0, tn, c0, c1, table, zero)
        for i in range(tn):
            pixels(table, dout.ctypes.data + o0 * 4, 4, 0, t0 + i, H, W, O, zero.ctypes.data)
            to_d(table_at(table, 0), at(d, i * ldd), rows * ldd, wide, at(zero, 0))
        for f in range(36):
            for k in range(0, wide, PANEL * WIDE):
                b = at(d, f * rows * ldd + k)
                for c in range(0, high, ROWS_T):
                    a, to = at(v, f * rows * ldv + c), at(dU, f * (high * wide + PAD) + c * wide + k)
                    if k + PANEL * WIDE <= wide:
                        products_t(a, ldv, b, ldd, to, wide, tn, add, PANEL, PANEL)
                    else:
                        product_t(a, ldv, b, ldd, to, wide, tn, add)
    if splits == 1:
        add_gradient(dU, dweight, block, table)


@parallel
def add_gradients(job, worker, sums, dweight, tables, splits):
    """The splits of a block of channels into dweight, in order."""
    for split in range(splits):
        add_gradient(sums[job * splits + split], dweight, job, tables[worker])


def _tables():
    return empty((parallel_cpu.threads(), 36), np.int64)


def transformed_weights(weight, turned=False):  # (3,3,C,O) -> (O/16, 36, C+1, 16); turned (C/16, 36, O+1, 16)
    C, O = weight.shape[2:]
    inner, outer = (O, C) if turned else (C, O)
    U, taps = empty((outer // PANEL, 36, inner + 1, PANEL)), weight.reshape(9, C, O)
    jobs = (C // PANEL) * (O // PANEL)
    if turned:
        weights_turned(jobs, taps, U, _tables(), empty((parallel_cpu.threads(), 9 * PANEL * PANEL)))
    else:
        weights_forward(jobs, taps, U, _tables())
    return U


def winograd(x, U, bias, residual=None):  # (B,H,W,C), U, (1 or B, O) -> (B,H,W,O)
    """Same-size 3x3 convolution with transformed weights. How it is cut into jobs does not change a bit of
    it."""
    B, H, W, C = x.shape
    O, threads = U.shape[0] * PANEL, parallel_cpu.threads()
    out, T = empty((B, H, W, O)), B * -(-H // 4) * -(-W // 4)
    count = -(-T // TILES)
    groups = -(-2 * threads // count) if count < 2 * threads else 1  # few blocks: cut the channels too
    V, M = empty((threads, 36, TILES + 1, C + PAD)), empty((threads, 36 * (TILES * min(GROUP, O) + PAD)))
    zeros, groups = empty((threads, 2, max(C, O) + PAD)), min(groups, O // PANEL)
    more = out[:0] if residual is None else residual
    tiles_forward(count * groups, x, U, bias, more, out, V, M, _tables(), zeros, count, groups)
    return out


def winograd_weight_gradient(x, dout, dweight):  # adds into dweight (3,3,C,O)
    """A number of splits that depends on shape alone, added in order: the same bits for any number of
    threads."""
    B, H, W, C = x.shape
    O, T, threads = dout.shape[3], B * -(-H // 4) * -(-W // 4), parallel_cpu.threads()
    blocks = -(-C // BLOCK) * -(-O // BLOCK)
    splits = max(1, min(T // CHUNK, 4 // blocks))  # enough jobs for some threads
    sums = empty((threads if splits == 1 else blocks * splits, 36 * (min(C, BLOCK) * min(O, BLOCK) + PAD)))
    V, D = (empty((threads, 36, CHUNK + 1, min(n, BLOCK) + PAD)) for n in (C, O))
    zeros, taps, tables = empty((threads, BLOCK)), dweight.reshape(9, C, O), _tables()
    tiles_gradient(blocks * splits, x, dout, sums, taps, V, D, tables, zeros, splits)
    if splits > 1:
        add_gradients(blocks, sums, taps, tables, splits)
