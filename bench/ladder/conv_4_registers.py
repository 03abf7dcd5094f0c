"""4. Sums stay in the registers.

The matrix product of step 3, but its inner loop is no longer left to the compiler: `make_product`
(nanodiff/kernels/simd_cpu.py) writes it as LLVM instructions. The sums of ROWS pixels x 16 output channels
stay in registers from k = 0 to 9*C, in vectors as wide as the machine has. For that the weights are packed
into panels of 16 output channels, [O/16, 9*C, 16], so that a panel is read from front to back.

Prediction. With AVX-512 ROWS is 12: a k loads one vector of weights and 12 values of the windows, each spread
over a vector as it comes, does 12 multiply-adds, and stores nothing. 13 loads at two in a cycle are 6.5
cycles, 12 multiply-adds 6: at most 92 % of the peak, 59 FLOP in a cycle. The vectors are twice as wide, so
twice the limit of step 3. (AVX2: 6 pixels x 2 vectors, 8 loads for 12 multiply-adds; vectors as wide as in
step 3, so the gain is only what step 3 lost on its way.) Loads and multiply-adds are so close to even that
whatever else a k needs, such as the addresses of 12 rows, is felt.

What limits it next: this is about what one core can do with these multiply-adds. There are more cores.
"""

import numpy as np
from conv_3_reuse import windows

from nanodiff.kernels.parallel_cpu import empty, njit
from nanodiff.kernels.simd_cpu import PANEL, ROWS, at, make_product

product = make_product(ROWS)


def packed(weight):  # (3,3,C,O) -> (O/16, 9*C, 16)
    C, O = weight.shape[2:]
    panels = empty((O // PANEL, 9 * C, PANEL))  # starts on a cache line, so that no vector lies across two
    panels[:] = weight.reshape(9 * C, O // PANEL, PANEL).swapaxes(0, 1)
    return panels


@njit
def fill(x, panels, bias, out):  # out (pixels, O), pixels rounded up to whole blocks of ROWS
    (P, K, _), O = panels.shape, out.shape[1]
    window = np.empty((ROWS, K), np.float32)
    for first in range(0, out.shape[0], ROWS):
        windows(x, first, window)
        out[first : first + ROWS] = bias
        for p in range(P):
            panel, sums = at(panels, p * K * PANEL), at(out, first * O + p * PANEL)
            product(at(window, 0), K, panel, PANEL, sums, O, K, 1)  # the 1: add to what is there


def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O); C a multiple of 4, O of 16
    B, H, W, _ = x.shape
    out = empty((-(-B * H * W // ROWS) * ROWS, bias.size))
    fill(x, packed(weight), bias, out)
    return out[: B * H * W].reshape(B, H, W, -1)
