"""1. The definition, as seven loops.

    out[b, h, w, o] = bias[o] + sum over i, j, c of x[b, h + i - 1, w + j - 1, c] * weight[i, j, c, o]

with zeros outside the image. Numba compiles it much as a C compiler would; it runs on one thread.

Prediction. A floating-point sum depends on its order, so the compiler must keep the order written here, and
every addition to `total` waits for the one before. A multiply-add delivers its result after 4 cycles: the
innermost loop does 2 FLOP in 4 cycles. A core that can begin two multiply-adds of 16 floats in every cycle
(AVX-512) does up to 2 * 16 * 2 = 64 FLOP in one. So this is about 1/128 of its speed, or 1/64 with the 8
floats of AVX2.

What limits it next: waiting. And neighbours in c lie O floats apart in the weights: of each cache line of 16
floats that comes, one is used.
"""

import numpy as np

from nanodiff.kernels.parallel_cpu import njit


@njit(flags={"contract"})  # a * b + c may become one instruction
def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O)
    B, H, W, C = x.shape
    O = weight.shape[3]
    out = np.empty((B, H, W, O), np.float32)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                for o in range(O):
                    total = bias[o]
                    for i in range(3):
                        for j in range(3):
                            v, u = h + i - 1, w + j - 1
                            if 0 <= v < H and 0 <= u < W:
                                for c in range(C):
                                    total += x[b, v, u, c] * weight[i, j, c, o]
                    out[b, h, w, o] = total
    return out
