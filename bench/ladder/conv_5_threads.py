"""5. All threads, each its outputs.

The loop over blocks of pixels becomes jobs of `@parallel` (nanodiff/kernels/parallel_cpu.py): every thread
takes the next job from a shared counter. A job writes outputs that no other job writes, all read the same x
and weights, and each worker has its own scratch memory for windows. So there is nothing to lock, nothing to
add up afterwards, and the bits are the same for any number of threads.

Prediction. 8 images of 32x32 make 683 jobs. One is 2 * 12 * 9 * C * O = 3.5 MFLOP for 128 channels, 20 us or
so at 60 FLOP in a cycle of 0.3 ns; to move the counter on takes about 0.1 us, and at the end a thread waits
for half a job. Nothing of that is felt: n cores are n times faster than one. If the system's "cores" are two
hardware threads of one core, they share its two multiply-add units, and the gain is only what step 4 left.

What limits it next: the multiply-add units are busy on every core. To go faster takes fewer multiply-adds.
"""

from conv_3_reuse import windows
from conv_4_registers import packed, product

from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.simd_cpu import PANEL, ROWS, at


@parallel
def fill(job, worker, x, panels, bias, out, scratch):
    (P, K, _), O = panels.shape, out.shape[1]
    first, window = job * ROWS, scratch[worker]
    windows(x, first, window)
    out[first : first + ROWS] = bias
    for p in range(P):
        panel, sums = at(panels, p * K * PANEL), at(out, first * O + p * PANEL)
        product(at(window, 0), K, panel, PANEL, sums, O, K, 1)


def conv(x, weight, bias):  # (B,H,W,C), (3,3,C,O), (O,) -> (B,H,W,O); C a multiple of 4, O of 16
    B, H, W, C = x.shape
    jobs = -(-B * H * W // ROWS)
    out, scratch = empty((jobs * ROWS, bias.size)), empty((parallel_cpu.threads(), ROWS, 9 * C))
    fill(jobs, x, packed(weight), bias, out, scratch)
    return out[: B * H * W].reshape(B, H, W, -1)
