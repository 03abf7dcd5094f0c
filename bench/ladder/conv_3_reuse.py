"""3. Load once, use four times.

First, the 9 * C values that a pixel looks at are copied into one row, zeros for what is outside the image.
A convolution is then a matrix product, windows [pixels, 9*C] @ weights [9*C, O], and knows of no borders.
Second, the product takes 4 pixels and 4 rows of the weights at a time. The 4 x 4 values of the windows are in
variables, which the compiler keeps in registers; a weight that was loaded serves 4 pixels, and a sum that was
loaded takes 4 multiply-adds before it is stored.

Prediction. 16 multiply-adds come with 4 loads of weights, 4 of sums and 4 stores; in step 2 it was 32 loads
and 16 stores. At two loads and a store in a cycle that is 4 cycles, and the 16 multiply-adds need 8: now
arithmetic is the limit, at 32 FLOP in a cycle with vectors of 8 floats, twice the best of step 2. The copies
are 9 * C values for 9 * C * O multiply-adds: nothing.

What limits it next: the compiler. It chose half the width of the registers, and it cannot be told to keep the
sums in them from the first k to the last.
"""

import numpy as np

from nanodiff.kernels.parallel_cpu import njit


@njit
def windows(x, first, window):
    """window[p] = the 3 * 3 * C values that pixel first + p of the batch looks at."""
    B, H, W, C = x.shape
    for p in range(window.shape[0]):
        b, h, w = (first + p) // (H * W), (first + p) // W % H, (first + p) % W
        for i in range(3):
            for j in range(3):
                v, u, k = h + i - 1, w + j - 1, (3 * i + j) * C
                inside = b < B and 0 <= v < H and 0 <= u < W
                for c in range(C):
                    window[p, k + c] = x[b, v, u, c] if inside else 0


@njit(flags={"contract", "reassoc"})  # reassoc: the four products may be added to the sum one by one
def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O); C a multiple of 4
    B, H, W, C = x.shape
    pixels, K, O = B * H * W, 9 * C, weight.shape[3]
    weight = weight.reshape(K, O)
    out = np.empty((pixels, O), np.float32)
    window, sums = np.empty((4, K), np.float32), np.empty((4, O), np.float32)
    for first in range(0, pixels, 4):
        windows(x, first, window)
        sums[:] = bias
        for k in range(0, K, 4):
            a0, a1, a2, a3 = window[0, k], window[0, k + 1], window[0, k + 2], window[0, k + 3]
            b0, b1, b2, b3 = window[1, k], window[1, k + 1], window[1, k + 2], window[1, k + 3]
            c0, c1, c2, c3 = window[2, k], window[2, k + 1], window[2, k + 2], window[2, k + 3]
            d0, d1, d2, d3 = window[3, k], window[3, k + 1], window[3, k + 2], window[3, k + 3]
            for o in range(O):
                w0, w1, w2, w3 = weight[k, o], weight[k + 1, o], weight[k + 2, o], weight[k + 3, o]
                sums[0, o] += a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                sums[1, o] += b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
                sums[2, o] += c0 * w0 + c1 * w1 + c2 * w2 + c3 * w3
                sums[3, o] += d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3
        n = min(4, pixels - first)
        out[first : first + n] = sums[:n]
    return out.reshape(B, H, W, O)
