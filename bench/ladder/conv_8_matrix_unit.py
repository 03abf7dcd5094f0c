"""8. The matrix unit, with bfloat16 in pairs.

Intel's servers since 2023 have a unit (AMX) that multiplies tiles of 16 x 32 and 32 x 16 bfloat16 and adds to
float32. Where there is none, this step is left out. A bfloat16 has 8 of the 24 significant bits of a float32,
so every value is split into two, x = hi + lo, and a product becomes three: hi hi + hi lo + lo hi. Step 6's
trick is kept in one direction, along the rows, where it halves the products; in both, its constants would
make more of the error of hi + lo than is allowed. The code is in nanodiff/kernels/tiles_cpu.py, amx_cpu.py
(the direct sum) and amx_winograd_cpu.py.

Prediction. A tile product is 16 * 16 * 32 multiply-adds in 16 cycles: 512 in a cycle against the 32 of two
vector units, 16 times the rate. Three products for one leave 16 / 3 = 5.3, or 341 FLOP in a cycle. Winograd
in vectors could reach 4 * 64 = 256 without transforms and memory, but has both. So: at least 1.3 times
step 7, and more as far as step 7 is from its ideal: it was 1.5 with the direct sum. Half the products did not
halve its time, with 1.5 values to split for each pixel and sums to transform back: 1.7 ms became 1.3. Two
hardware threads of one core share one matrix unit.

What limits it next: the tile products, and to split x and fetch operands as fast as the unit takes them.
"""

from nanodiff.kernels.conv_cpu import conv_forward, conv_prepare
from nanodiff.kernels.parallel_cpu import AMX

available = AMX == 1  # 0: no such unit here, or NANODIFF_AMX=0; 2: emulated, for tests


def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O)
    _, H, W, _ = x.shape
    return conv_forward(x, conv_prepare(weight, H, W, 1, (1, 1)), bias, 1, (1, 1))
