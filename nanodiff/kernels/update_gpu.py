"""The optimiser's passes over the flat buffers on the GPU. Maths: update_ref.py."""

import numpy as np

from nanodiff.kernels.device_gpu import empty, launch, shadow_of

__all__ = ["zero_grad", "squared_norm", "adam_update", "prepare_weights"]

CHUNK = 1 << 15  # elements that one block adds up


def spread(source, kernel, n, each, args, defines=()):
    """Launch a thread for every `each` of n elements."""
    if n:
        launch(source, kernel, (-(-n // (256 * each)),), (256,), (*args, np.uint64(n)), defines=defines)


def total(parts, divisor):
    """Sum of float64 (n,), divided: float64 (1,)."""
    out = empty((1,), np.float64)
    launch("update_gpu.cu", "total", (1,), (256,), (parts, out, parts.size, np.float64(divisor)))
    return out


def zero_grad(buffer):
    spread("update_gpu.cu", "zero_grad", buffer.size, 4, (buffer,))


def squared_norm(grad):
    parts = empty((max(1, -(-grad.size // CHUNK)),), np.float64)
    args = grad, parts, np.uint64(grad.size), CHUNK
    launch("update_gpu.cu", "squared_norm", parts.shape, (256,), args)
    return total(parts, 1)


def adam_update(weights, grad, m, v, ema, state, lr, beta1, beta2, eps, clip, ema_decay):
    """lr: a number, or a device array of one float64."""
    numbers, at = empty((5,), np.float32), (lr, 0.0) if getattr(lr, "shape", ()) else (None, lr)
    at = at[0], *map(np.float64, (at[1], beta1, beta2, clip, ema_decay))
    launch("update_gpu.cu", "adam_numbers", (1,), (32,), (state, numbers, *at))
    betas = 1 - beta1, 1 - beta2
    args = weights, grad, m, v, ema if ema.size else None, numbers, *map(float, (*betas, eps))
    spread("update_gpu.cu", "adam_update", weights.size, 4, args)


def prepare_weights(flat, dtype):
    shadow = shadow_of(flat) if dtype == "bfloat16" else None
    if shadow is not None:
        spread("update_gpu.cu", "prepare_weights", flat.size, 8, (flat, shadow))
