"""Matrix products on the CPU, for linear layers and for every convolution that is not Winograd.

A convolution is a matrix product of its windows: row = output pixel, column = (tap, input channel). The
windows of a few pixels at a time are gathered into scratch memory that stays in the cache (an "im2col" of a
few rows, not of the image), then multiplied with weights packed in panels of 16 output channels. The gather
costs one copy for every 2 * O operations on the copied value, and in return any kernel size, stride,
padding and channel count is the same code. Gradients of the data gather from dout instead of x; those of
the weights multiply transposed windows.

Rows count the pixels of a grid in each image; taps are pairs (dy, dx). Row (b, y, x) gathers, of image b, the
pixels (y * scale + dy, x * scale + dx), or, going back through a stride, (y + dy, x + dx) / stride.
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, njit, parallel
from nanodiff.kernels.simd_cpu import PANEL, ROWS, ROWS_T, WIDE, at, make_product, shift

product, products = make_product(ROWS), make_product(ROWS, panels=WIDE)
product_t, products_t = (make_product(ROWS_T, transposed=True, panels=n) for n in (1, WIDE))
WINDOWS = 1 << 17  # floats of windows gathered at a time: a quarter of a 2 MB L2 cache
PIXELS = 96  # rows summed at a time in a weight gradient: their windows and gradients stay in the cache
WROWS = 64  # rows of the weight gradient that one job owns


def panels(n):
    return -(-n // PANEL)


@parallel
def pack(job, worker, weight, taps, transposed, out):
    """out[p, tap, c, :] = weight[tap, c, 16p:16p+16], or weight[tap, 16p:16p+16, c] if transposed; 0 beyond.

    One job per 16 rows of a tap, which are read in the order in which they lie in memory; `taps` lists the
    taps of the weights in the order of the panels.
    """
    _, C, O = weight.shape
    i, first = job % taps.size, job // taps.size * PANEL
    w, high = weight[taps[i]], min(PANEL, C - first)
    if transposed:
        to = out[first // PANEL, i]
        for o in range(O):
            for q in range(high):
                to[o, q] = w[first + q, o]
            for q in range(high, PANEL):
                to[o, q] = 0
        return
    for c in range(first, first + high):
        for p in range(O // PANEL):
            for q in range(PANEL):
                out[p, i, c, q] = w[c, p * PANEL + q]
        if O % PANEL:
            for q in range(PANEL):
                o = O // PANEL * PANEL + q
                out[O // PANEL, i, c, q] = w[c, o] if o < O else np.float32(0)


def packed(weight, taps=None, transposed=False):  # (taps, C, O) -> (panels, taps, C, 16)
    taps = np.arange(weight.shape[0]) if taps is None else taps
    inner, outer = weight.shape[1:] if not transposed else weight.shape[:0:-1]
    out = empty((panels(outer), taps.size, inner, PANEL))
    pack(panels(weight.shape[1]) * taps.size, weight, taps, int(transposed), out)
    return out


@njit
def gather(x, taps, window, row, n, width, area, offset, grid, scale, first, depth):
    """window[i, :] = the values of x under the taps of row `row + i`, for i < n; zero outside the image.

    Rows count the pixels of a grid of `area` pixels, `width` wide, in each image. With scale > 0 pixel (y, x)
    of the grid looks at (y, x) * scale + tap; with scale < 0 at (((y, x) * grid + offset) + tap) / -scale,
    both exact. Only columns first .. first + depth of the window are made.
    """
    _, H, W, C = x.shape
    b, y, z = row // area, row % area // width, row % width
    for i in range(n):
        column, t, c = 0, first // C, first % C
        while column < depth:
            run = min(C - c, depth - column)
            if scale > 0:
                u, v = y * scale + taps[t, 0], z * scale + taps[t, 1]
            else:
                u = (y * grid + offset[0] + taps[t, 0]) // -scale
                v = (z * grid + offset[1] + taps[t, 1]) // -scale
            to = window[i, column : column + run]
            if (u >= 0) & (u < H) & (v >= 0) & (v < W):
                pixel = x[b, u, v, c : c + run]
                for j in range(run):
                    to[j] = pixel[j]
            else:
                for j in range(run):
                    to[j] = 0
            column, t, c = column + run, t + 1, 0
        z += 1  # the next pixel of the grid, without a division
        if z == width:
            z, y = 0, y + 1
            if y * width == area:
                y, b = 0, b + 1


@parallel(flags={"contract"})
def windows_product(job, worker, x, weight, bias, residual, out, taps, geometry, scratch, block, groups):
    """out[pixel] = bias + residual[pixel] + window(pixel) @ weight.

    A job makes `block` rows of one of `groups` groups of panels: in place where the rows are those of `out`
    and whole tiles, else in scratch memory.
    """
    rows, width, area, scale, grid, oy, ox, plain = geometry
    P, T, C, _ = weight.shape
    depth, O = T * C, out.shape[3]
    OH, OW = out.shape[1], out.shape[2]
    r0, group = job // groups * block, job % groups
    n, p0, p1 = min(block, rows - r0), group * P // groups, (group + 1) * P // groups
    flat, result = x.reshape(-1, C), out.reshape(-1, O)
    window = scratch[worker, : block * depth].reshape(block, depth)
    tile = scratch[worker, block * depth :].reshape(block, P * PANEL)
    if plain and n % ROWS == 0:  # one tap, no border: the rows of x are the windows
        a = at(flat, r0 * C)
    else:
        a = at(window, 0)
        gather(x, taps, window, r0, n, width, area, (oy, ox), grid, scale, 0, depth)
        window[n:, :] = 0
    here = (grid == 1) & (O % PANEL == 0) & (n % ROWS == 0)
    sums = result[r0:] if here else tile
    o0, o1, ldo = p0 * PANEL, min(O, p1 * PANEL), sums.shape[1]
    for i in range(n):
        start = bias[(r0 + i) // area if bias.shape[0] > 1 else 0]
        for o in range(o0, o1):
            sums[i, o] = start[o]
        if residual.size:
            for o in range(o0, o1):
                sums[i, o] += residual[r0 + i, o]
    for p in range(p0, p1, WIDE):
        w = at(weight, p * depth * PANEL)
        for r in range(0, n, ROWS):
            to = at(sums, r * ldo + p * PANEL)
            if p + WIDE <= p1:
                products(shift(a, r * depth), depth, w, PANEL, to, ldo, depth, 1, depth * PANEL, PANEL)
            else:
                product(shift(a, r * depth), depth, w, PANEL, to, ldo, depth, 1)
    if not here:
        for i in range(n):
            to_row = r0 + i
            if grid > 1:  # the rows are every grid-th pixel of the output
                b, y, z = to_row // area, to_row % area // width, to_row % width
                to_row = (b * OH + y * grid + oy) * OW + z * grid + ox
            for o in range(o0, o1):
                result[to_row, o] = tile[i, o]


def convolve(x, weight, bias, out, taps, width, area, scale=1, grid=1, offset=(0, 0), residual=None):
    """Fill `out` (or every grid-th pixel of it from `offset` on) with bias + windows of x @ packed weight
    (+ residual, shaped like out; not with a grid).

    x (B,H,W,C), weight (panels, taps, C, 16), bias (1 or B, O), taps int64 (T, 2 or more) of (dy, dx, ...);
    the grid of output pixels has `area` pixels, `width` wide, in each image.
    """
    P, T, C, _ = weight.shape
    rows, threads = x.shape[0] * area, parallel_cpu.threads()
    plain = T == 1 and scale == 1 and grid == 1 and not taps[0, :2].any() and area == x.shape[1] * x.shape[2]
    geometry = np.array([rows, width, area, scale, grid, *offset, plain], np.int64)
    most = 2 if rows < 16 * ROWS * threads else 8
    block = ROWS * max(1, min(most, WINDOWS // (ROWS * T * C)))
    groups = 1 if rows >= 2 * threads * block else min(P, 2 * threads)
    scratch = empty((threads, block * (P * PANEL + T * C)))
    jobs = -(-rows // block) * groups
    more = (out[:0] if residual is None else residual).reshape(-1, out.shape[3])
    windows_product(jobs, x, weight, bias, more, out, taps, geometry, scratch, block, groups)


@parallel
def windows_product_t(job, worker, x, dout, taps, geometry, partial, scratch, splits):
    """partial[split, panel, row] = sum over the pixels of a split of window(pixel)[row] * dout[pixel, panel].

    A job owns WROWS rows (tap, channel) of one split; its pixels come in order, PIXELS at a time.
    """
    rows, width, area, scale, depth, plain = geometry
    C, O = x.shape[3], dout.shape[3]
    _, P, R, _ = partial.shape
    split, first = job % splits, job // splits * WROWS
    high = min(WROWS, R - first)
    valid = min(high, depth - first)
    window = scratch[worker, : PIXELS * WROWS].reshape(PIXELS, WROWS)
    drows = scratch[worker, PIXELS * WROWS :].reshape(PIXELS, P * PANEL)
    flat = dout.reshape(-1, O)
    window[:, :] = 0
    drows[:, :] = 0
    whole = O % PANEL == 0  # then dout is its own panels, and with `plain` x its own window
    r0, r1 = split * rows // splits, (split + 1) * rows // splits
    for r in range(r0, r1, PIXELS):
        n = min(PIXELS, r1 - r)
        if not plain:
            gather(x, taps, window, r, n, width, area, (0, 0), 1, scale, first, valid)
        if not whole:
            for i in range(n):
                for o in range(O):
                    drows[i, o] = flat[r + i, o]
        a, lda = (at(x, r * C + first), C) if plain else (at(window, 0), WROWS)
        d, ldd = (at(dout, r * O), O) if whole else (at(drows, 0), P * PANEL)
        add = int(r > r0)
        for p in range(0, P, WIDE):
            b = shift(d, p * PANEL)
            for c in range(0, high, ROWS_T):
                target = at(partial, ((split * P + p) * R + first + c) * PANEL)
                if p + WIDE <= P:
                    products_t(shift(a, c), lda, b, ldd, target, PANEL, n, add, PANEL, R * PANEL)
                else:
                    product_t(shift(a, c), lda, b, ldd, target, PANEL, n, add)


@parallel
def add_partials(job, worker, partial, dweight):
    """dweight[row] += the partial sums of all splits, in order; a job owns ROWS_T rows."""
    S, P, R, _ = partial.shape
    depth, O = dweight.shape
    for row in range(job * ROWS_T, min(job * ROWS_T + ROWS_T, depth)):
        for p in range(P):
            wide = min(PANEL, O - p * PANEL)
            for q in range(wide):
                total = partial[0, p, row, q]
                for s in range(1, S):
                    total += partial[s, p, row, q]
                dweight[row, p * PANEL + q] += total


def weight_gradient(x, dout, dweight, taps, scale=1):
    """dweight (taps * C, O) += sum over output pixels of window^T dout. x (B,H,W,C), dout (B,Ho,Wo,O)."""
    depth, O = dweight.shape
    rows = dout.shape[0] * dout.shape[1] * dout.shape[2]
    R = -(-depth // ROWS_T) * ROWS_T
    owners = -(-R // WROWS)
    # enough jobs for many threads, and a matter of shape alone: the split decides the order of the sums
    splits = max(1, min(-(-rows // 256), -(-16 // owners)))
    same = len(taps) == 1 and scale == 1 and not taps[0, :2].any() and dout.shape[1:3] == x.shape[1:3]
    plain = same and depth % ROWS_T == 0
    geometry = np.array([rows, dout.shape[2], dout.shape[1] * dout.shape[2], scale, depth, plain], np.int64)
    partial = empty((splits, panels(O), R, PANEL))
    scratch = empty((parallel_cpu.threads(), PIXELS * (WROWS + panels(O) * PANEL)))
    windows_product_t(owners * splits, x, dout, taps, geometry, partial, scratch, splits)
    add_partials(R // ROWS_T, partial, dweight)


@parallel(flags={"contract"})
def row_sums(job, worker, x, out):
    """out[job] = sum of rows job * n / jobs .. (job + 1) * n / jobs of x."""
    S, (n, O) = out.shape[0], x.shape
    for o in range(O):
        out[job, o] = 0
    for r in range(job * n // S, (job + 1) * n // S):
        for o in range(O):
            out[job, o] += x[r, o]


def sums(x, groups):  # (n, O) -> (groups, O)
    out = empty((groups, x.shape[1]))
    row_sums(groups, x, out)
    return out
