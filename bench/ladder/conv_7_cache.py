"""7. Values stay in the cache.

The arithmetic of step 6 in another order: the three passes are made for some 24 tiles, then for the next 24.
V (36 x 24 x C floats, 442 KB for 128 channels) and M (64 output channels at a time, 221 KB) never leave the
L2 cache of the core that works on them, if it has 1 MB. This is the kernel as nanodiff calls it where there
is no matrix unit, `winograd` in nanodiff/kernels/winograd_cpu.py.

Prediction. The 38 MB that step 6 moved through memory are gone. In return each of the 22 blocks reads all
transformed weights, 36 * C * O * 4 = 2.4 MB, where step 6 read them once: 52 MB, but only to read, in order,
so that they arrive ahead of their use. If the cache that all cores share delivers that, a block takes the
time of its arithmetic: what step 6 lost to memory is won back, at most a factor of 2 with its figures. Half
the channels: half of the traffic of V and M, but a quarter of that of the weights and of the multiply-adds,
so the gain is larger.

What limits it next: multiply-adds again, the weights from the shared cache, and a tenth for the transforms.
"""

from nanodiff.kernels.winograd_cpu import transformed_weights, winograd


def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O); C and O multiples of 16
    return winograd(x, transformed_weights(weight), bias[None])
