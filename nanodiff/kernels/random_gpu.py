"""Philox words and normals on the GPU: the same bits as random_ref.py. `step` may be a device array too."""

import math

import numpy as np

from nanodiff.kernels.device_gpu import empty, launch

__all__ = ["random_bits", "normal"]

LOW = 0xFFFFFFFF


def stepped(step):
    """A step as kernels take it: where it lies (one that changes between replays) or None, and its value."""
    return (step, np.uint32(0)) if getattr(step, "shape", ()) else (None, np.uint32(int(step) & LOW))


def _draw(dtype, shape, seed, step, purpose, first):
    samples, size, out = shape[0], math.prod(shape[1:]), empty(shape, dtype)
    threads = samples * -(-size // 4)
    if threads:
        sizes, numbers = map(np.uint32, (samples, size)), map(np.uint32, (purpose, first & LOW))
        args = out, *sizes, np.uint64(seed), *stepped(step), *numbers, dtype == np.float32
        launch("random_gpu.cu", "draw", (-(-threads // 256),), (256,), args)
    return out


def random_bits(shape, seed, step, purpose, first=0):
    return _draw(np.uint32, shape, seed, step, purpose, first)


def normal(shape, seed, step, purpose, first=0):
    return _draw(np.float32, shape, seed, step, purpose, first)
