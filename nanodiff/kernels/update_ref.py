"""The optimiser's passes over the flat buffers, in NumPy: the definition. They work in place."""

import numpy as np

__all__ = ["zero_grad", "squared_norm", "adam_update", "prepare_weights"]


def zero_grad(buffer):
    """buffer = 0, in place."""
    buffer[...] = 0


def squared_norm(grad):  # (n,) -> float64 (1,)
    """Sum of squares, in float64."""
    return np.array([np.square(grad, dtype=np.float64).sum()])


def adam_update(weights, grad, m, v, ema, state, lr, beta1, beta2, eps, clip, ema_decay):
    """One step of Adam (Kingma & Ba 2015, algorithm 1), with clipping and an average of the weights.

    state  float64 (4,): loss, squared gradient norm, steps taken, steps skipped. If one of the first two is
           not finite, the step does nothing but count itself as skipped: no host ever has to look.
    clip   largest gradient norm, 0 for none: grad is used times min(1, clip / (norm + 1e-6)), and not changed
    ema    the running average of the weights, or an array of no elements;
           its decay warms up as min(ema_decay, (1 + n) / (10 + n)), n = steps taken before
    """
    if not np.isfinite(state[:2]).all():
        state[3] += 1
        return
    n = state[2]
    state[2] += 1
    scale = min(1.0, clip / (np.sqrt(state[1]) + 1e-6)) if clip else 1.0
    g = grad * grad.dtype.type(scale)
    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    step_size = lr / (1 - beta1 ** state[2])
    weights -= step_size * m / (np.sqrt(v) / np.sqrt(1 - beta2 ** state[2]) + eps)
    if ema.size:
        ema += (1 - min(ema_decay, (1 + n) / (10 + n))) * (weights - ema)


def prepare_weights(flat, dtype):
    """Whatever the rendition keeps of all weights beside them, brought up to date; on the GPU a copy in
    `dtype`, "bfloat16"; here nothing."""
