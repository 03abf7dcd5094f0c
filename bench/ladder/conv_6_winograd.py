"""6. Four times fewer multiplications.

Winograd's F(4x4, 3x3); nanodiff/kernels/winograd_cpu.py tells what its transforms are. The 6x6 inputs of a
tile of 4x4 outputs become 36 "frequencies", these are multiplied by 36 transformed weights and summed over
the channels, and the 36 sums become 16 outputs: 36 multiplications where a direct sum needs 16 * 9 = 144.
Here these are three passes over all tiles: transform, 36 products [tiles, C] @ [C, O], transform back.

Prediction, C = O = 128. The products take a quarter of step 5's time. For 16 channels of a tile a transform
is 12 one-dimensional ones of 13 instructions, back it is 10 of 10, with 140 loads and stores about 400
instructions in all, for 36 * 128 = 4608 multiply-adds: +9 %. But V and M have 36/16 as many values as x and
out, 9.4 MB each for 8 images of 32x32: too much for an L2 cache, and both are written and read again, 38 MB.
At 20 GB/s that is 1.9 ms; the products, 0.6 GFLOP, take 2 ms at 300 GFLOP/s (two cores with AVX-512). So: not
four times faster but two.

What limits it next: memory, unless cores are few or slow. And there is a price: the constants of the
transforms reach 8 and enlarge rounding errors a few times.
"""

import numpy as np

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.simd_cpu import PANEL, ROWS, at, make_product, make_transform, table_at
from nanodiff.kernels.winograd_cpu import at4, bt, pixels, transformed_weights

product = make_product(ROWS)
to_v, to_y = make_transform(bt, 6), make_transform(at4, 6, back=True, bias=True)


@parallel
def transform(tile, worker, x, V, tables, zero):
    """V[:, tile] = B^T x B; `pixels` lists the addresses of the 6x6 inputs, that of `zero` for the border."""
    _, H, W, C = x.shape
    (_, T, ldv), table = V.shape, tables[worker]
    pixels(table, x.ctypes.data, 6, -1, tile, H, W, C, zero.ctypes.data)
    to_v(table_at(table, 0), at(V, tile * ldv), T * ldv, C, at(zero, 0))


@parallel
def multiply(f, worker, V, U, M):
    """M[f] = V[f] @ U[f]; U is packed in panels of 16 output channels, a row between frequencies unused."""
    (_, T, ldv), (P, _, rows, _), ldm = V.shape, U.shape, M.shape[2]
    for p in range(P):
        for t in range(0, T, ROWS):
            v, m = at(V, (f * T + t) * ldv), at(M, (f * T + t) * ldm + p * PANEL)
            product(v, ldv, at(U, (p * 36 + f) * rows * PANEL), PANEL, m, ldm, rows - 1, 0)


@parallel
def transform_back(tile, worker, M, bias, out, tables, trash):
    """The 4x4 outputs A^T M[:, tile] A + bias; `trash` takes those beyond the border."""
    _, H, W, O = out.shape
    (_, T, ldm), table = M.shape, tables[worker]
    pixels(table, out.ctypes.data, 4, 0, tile, H, W, O, trash.ctypes.data)
    to_y(table_at(table, 0), at(M, tile * ldm), T * ldm, O, at(bias, 0))


def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O); C and O multiples of 16
    (B, H, W, C), O, threads = x.shape, bias.size, parallel_cpu.threads()
    tiles = B * -(-H // 4) * -(-W // 4)
    T = -(-tiles // ROWS) * ROWS
    # 16 floats more in a row: lines a power of two apart would share few places in the caches
    out, V, M = empty((B, H, W, O)), empty((36, T, C + 16)), empty((36, T, O + 16))
    tables = empty((threads, 36), np.int64)
    transform(tiles, x, V, tables, np.zeros(C, np.float32))
    multiply(36, V, transformed_weights(weight), M)
    transform_back(tiles, M, bias, out, tables, empty((O,)))
    return out
