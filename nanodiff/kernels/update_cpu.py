"""The optimiser's passes over the flat buffers on the CPU, in chunks of a fixed size. Maths:
update_ref.py."""

import numpy as np

from nanodiff.kernels.parallel_cpu import parallel
from nanodiff.kernels.simd_cpu import at, prefetch
from nanodiff.kernels.sums_cpu import zero_chunk
from nanodiff.kernels.update_ref import prepare_weights  # noqa: F401  (nothing to do here either)

__all__ = ["zero_grad", "squared_norm", "adam_update", "prepare_weights"]

CHUNK = 1 << 15
SOON = 4096  # floats ahead of those being summed, whose cache lines are asked for
f32 = np.float32


def _chunks(n):
    return -(-n // CHUNK)


def zero_grad(buffer):
    if buffer.ctypes.data % 64 or buffer.size % 16:  # not a buffer of Params
        buffer[...] = 0
    else:
        zero_chunk(_chunks(buffer.size), buffer)


@parallel(flags={"contract", "reassoc"})
def squared_chunk(job, worker, grad, sums):
    g, total = grad[job * CHUNK : (job + 1) * CHUNK], 0.0
    for start in range(0, g.size, 256):
        prefetch(at(grad, job * CHUNK + start + SOON), 256)
        some, part = g[start : start + 256], f32(0)  # 256 squares in float32 on SIMD lanes, then float64
        for i in range(some.size):
            part += some[i] * some[i]
        total += part
    sums[job] = total


def squared_norm(grad):
    sums = np.empty(_chunks(grad.size))
    squared_chunk(sums.size, grad, sums)
    return sums.sum(keepdims=True)


@parallel(flags={"contract"})
def adam_chunk(job, worker, weights, grad, m, v, ema, state, lr, beta1, beta2, eps, clip, ema_decay):
    if not (np.isfinite(state[0]) and np.isfinite(state[1])):
        return
    n = state[2]
    scale = f32(min(1.0, clip / (np.sqrt(state[1]) + 1e-6)) if clip > 0 else 1.0)
    step_size = f32(lr / (1 - beta1 ** (n + 1)))
    root = f32(1 / np.sqrt(1 - beta2 ** (n + 1)))
    b1, b2, e, keep = f32(1 - beta1), f32(1 - beta2), f32(eps), f32(1 - min(ema_decay, (1 + n) / (10 + n)))
    start, stop = job * CHUNK, min((job + 1) * CHUNK, weights.size)
    w, g, m, v = weights[start:stop], grad[start:stop], m[start:stop], v[start:stop]
    for i in range(w.size):
        d = g[i] * scale
        m[i] += b1 * (d - m[i])
        v[i] += b2 * (d * d - v[i])
        w[i] -= step_size * m[i] / (np.sqrt(v[i]) * root + e)
    if ema.size:
        average = ema[start:stop]
        for i in range(w.size):
            average[i] += keep * (w[i] - average[i])


def adam_update(weights, grad, m, v, ema, state, lr, beta1, beta2, eps, clip, ema_decay):
    numbers = (float(c) for c in (lr, beta1, beta2, eps, clip, ema_decay))
    adam_chunk(_chunks(weights.size), weights, grad, m, v, ema, state, *numbers)
    state[2 if np.isfinite(state[:2]).all() else 3] += 1
