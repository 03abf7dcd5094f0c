"""Nearest up-sampling and the joining and parting of channels on the GPU. Maths: resample_ref.py."""

import numpy as np

from nanodiff.kernels.device_gpu import element, empty, launch

__all__ = ["upsample_forward", "upsample_backward", "concat", "split"]


def _run(kernel, counted, args, *channels):
    """A thread for every vector of `counted`; the numbers of channels are handed over in vectors."""
    lanes = 16 // counted.dtype.itemsize
    vector = 1 if any(c % lanes for c in channels) else lanes
    count, numbers = counted.size // vector, [c // vector for c in channels]
    defines = element(counted), ("VEC", vector)
    args = *args, *numbers, np.uint32(count)
    launch("resample_gpu.cu", kernel, (-(-count // 256),), (256,), args, defines=defines)


def upsample_forward(x):
    B, H, W, C = x.shape
    out = empty((B, 2 * H, 2 * W, C), x.dtype)
    _run("upsample_forward", x, (x, out, W), C)
    return out


def upsample_backward(dout):
    B, H, W, C = dout.shape
    dx = empty((B, H // 2, W // 2, C), dout.dtype)
    _run("upsample_backward", dx, (dout, dx, W // 2), C)
    return dx


def concat(a, b):
    C, D = a.shape[-1], b.shape[-1]
    out = empty((*a.shape[:-1], C + D), a.dtype)
    _run("concat", out, (a, b, out), C, D)
    return out


def split(x, C):
    D = x.shape[-1] - C
    a, b = empty((*x.shape[:-1], C), x.dtype), empty((*x.shape[:-1], D), x.dtype)
    _run("split", x, (x, a, b), C, D)
    return a, b
