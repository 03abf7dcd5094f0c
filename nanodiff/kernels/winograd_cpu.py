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
from nanodiff.kernels.simd_cpu import PANEL, ROWS, ROWS_T, at, make_product, make_transform, table_at

PAD = 16  # floats added to long rows, so that they do not all fall into the same sets of the cache
TILES = (
    12 if ROWS == 6 else ROWS
)  # tiles transformed at a time: their 36 * TILES * C values stay in the L2 cache
WIDE = 64  # output channels multiplied at a time
CHUNK = 128  # tiles summed at a time in a weight gradient


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


product, product_t = make_product(ROWS), make_product(ROWS_T, transposed=True)
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
def block_v(x, V, t0, i0, i1, table, zero):
    """V[f, i] = B^T x B of the tiles t0 + i, i0 <= i < i1."""
    _, H, W, C = x.shape
    for i in range(i0, i1):
        pixels(table, x.ctypes.data, 6, -1, t0 + i, H, W, C, zero.ctypes.data)
        to_v(table_at(table, 0), at(V, i * V.shape[2]), V.shape[1] * V.shape[2], C, at(zero, 0))


@njit
def block_y(V, U, out, bias, residual, t0, tn, k0, k1, M, table, zero, trash):
    """Channels k0 .. k1 of tiles t0 .. t0 + tn of out: 36 products into M, then A^T . A, bias and
    residual."""
    _, H, W, O = out.shape
    C, ldv, wide, rows = U.shape[2], V.shape[2], k1 - k0, (tn + ROWS - 1) // ROWS * ROWS
    stride = rows * wide + PAD
    tiles = ((H + 3) // 4) * ((W + 3) // 4)
    for f in range(36):
        for k in range(0, wide, PANEL):
            u = at(U, ((k0 + k) // PANEL * 36 + f) * C * PANEL)
            for r in range(0, rows, ROWS):
                v = at(V, (f * V.shape[1] + r) * ldv)
                product(v, ldv, u, PANEL, at(M, f * stride + r * wide + k), wide, C, 0)
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
    """A job: one block of tiles, one of `groups` groups of output channels; V and M are private to a
    worker."""
    N, H, W, O = out.shape
    T = N * ((H + 3) // 4) * ((W + 3) // 4)
    b, group = job % count, job // count
    t0, t1 = b * T // count, (b + 1) * T // count
    table, zero, trash = tables[worker], zeros[worker, 0], zeros[worker, 1]
    zero[:] = 0
    block_v(x, V[worker], t0, 0, t1 - t0, table, zero)
    k1 = (group + 1) * (O // PANEL) // groups * PANEL
    for k in range(group * (O // PANEL) // groups * PANEL, k1, WIDE):
        wide = min(k + WIDE, k1)
        block_y(V[worker], U, out, bias, residual, t0, t1 - t0, k, wide, M[worker], table, zero, trash)


@parallel
def weights_forward(job, worker, weight, U, tables):
    """U[panel, f, c] = G w G^T for the panel's 16 output channels; a job does 16 input channels of a
    panel."""
    _, C, O = weight.shape
    k, c0 = job // (C // PANEL), job % (C // PANEL) * PANEL
    table = tables[worker]
    for c in range(c0, c0 + PANEL):
        for i in range(9):
            table[i] = weight.ctypes.data + ((i * C + c) * O + k * PANEL) * 4
        to_u(table_at(table, 0), at(U, (k * 36 * C + c) * PANEL), C * PANEL, PANEL, at(U, 0))


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
    to_u(table_at(table, 0), at(U, (c * 36 * O + k * PANEL) * PANEL), O * PANEL, PANEL * PANEL, at(U, 0))


@parallel
def tiles_transform(job, worker, x, dout, V, D, tables, zeros, t0, tn):
    """V and D of eight tiles of a chunk, for the weight gradient."""
    i0, i1 = job * 8, min(job * 8 + 8, tn)
    table, zero = tables[worker], zeros[worker]
    zero[: max(x.shape[3], dout.shape[3])] = 0
    block_v(x, V, t0, i0, i1, table, zero)
    _, H, W, O = dout.shape
    for i in range(i0, i1):
        pixels(table, dout.ctypes.data, 4, 0, t0 + i, H, W, O, zero.ctypes.data)
        to_d(table_at(table, 0), at(D, i * D.shape[2]), D.shape[1] * D.shape[2], O, at(zero, 0))


@parallel
def chunk_products(job, worker, V, D, dU, tn, add):
    """dU[panel, f] (+)= V[f]^T D[f, panel] over the tn tiles of a chunk; a job is one frequency."""
    f, (K, _, C, _) = job, dU.shape
    ldv, ldd = V.shape[2], D.shape[2]
    for k in range(K):
        d = at(D, f * D.shape[1] * ldd + k * PANEL)
        for c in range(0, C, ROWS_T):
            target = at(dU, ((k * 36 + f) * C + c) * PANEL)
            product_t(at(V, f * V.shape[1] * ldv + c), ldv, d, ldd, target, PANEL, tn, add)


@parallel
def weights_gradient(job, worker, dU, dweight, tables):
    """dweight += G^T dU G; jobs as in weights_forward."""
    _, C, O = dweight.shape
    k, c0 = job // (C // PANEL), job % (C // PANEL) * PANEL
    table = tables[worker]
    for c in range(c0, c0 + PANEL):
        for i in range(9):
            table[i] = dweight.ctypes.data + ((i * C + c) * O + k * PANEL) * 4
        to_dw(table_at(table, 0), at(dU, (k * 36 * C + c) * PANEL), C * PANEL, PANEL, at(dU, 0))


def _tables():
    return empty((parallel_cpu.threads(), 36), np.int64)


def transformed_weights(weight, turned=False):  # (3,3,C,O) -> (O/16, 36, C, 16) or, turned, (C/16, 36, O, 16)
    C, O = weight.shape[2:]
    inner, outer = (O, C) if turned else (C, O)
    U, taps = empty((outer // PANEL, 36, inner, PANEL)), weight.reshape(9, C, O)
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
    # few blocks: cut the channels too; large U: each thread reads half of it at a time
    groups = -(-2 * threads // count) if count < 2 * threads else 2 if C * O >= 256 * 256 else 1
    V = empty((threads, 36, TILES + ROWS, C + PAD))
    M = empty((threads, 36 * ((TILES + ROWS) * min(WIDE, O) + PAD)))
    zeros, groups = empty((threads, 2, max(C, O) + PAD)), min(groups, O // PANEL)
    more = out[:0] if residual is None else residual
    tiles_forward(count * groups, x, U, bias, more, out, V, M, _tables(), zeros, count, groups)
    return out


def winograd_weight_gradient(x, dout, dweight):  # adds into dweight (3,3,C,O)
    """Chunks of a fixed size in a fixed order: the same bits for any number of threads."""
    B, H, W, C = x.shape
    O, T = dout.shape[3], B * -(-H // 4) * -(-W // 4)
    V, D = empty((36, CHUNK, C + PAD)), empty((36, CHUNK, O + PAD))
    dU, tables = empty((O // PANEL, 36, C, PANEL)), _tables()
    zeros = empty((parallel_cpu.threads(), max(C, O) + PAD))
    for t0 in range(0, T, CHUNK):
        tn = min(CHUNK, T - t0)
        tiles_transform(-(-tn // 8), x, dout, V, D, tables, zeros, t0, tn)
        chunk_products(36, V, D, dU, tn, int(t0 > 0))
    weights_gradient((C // PANEL) * (O // PANEL), dU, dweight.reshape(9, C, O), tables)
