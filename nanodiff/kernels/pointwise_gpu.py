"""Ops on one element at a time, and the loss, on the GPU. Maths: pointwise_ref.py.

Indices, times and other arrays of one number per sample may lie on the host too: outside of recorded steps.
"""

import math

import numpy as np

from nanodiff.kernels.device_gpu import BF16, element, empty, launch, on_device, upload
from nanodiff.kernels.norm_gpu import slabs
from nanodiff.kernels.random_gpu import stepped
from nanodiff.kernels.random_ref import DROPOUT
from nanodiff.kernels.update_gpu import spread, total

__all__ = [
    "add", "affine", "activation_forward", "activation_backward", "modulate_forward", "modulate_backward",
    "time_embedding", "embedding_forward", "embedding_backward", "dropout", "q_sample", "mse_loss",
    "cast", "gather_images", "sample_step",
]  # fmt: skip

HERE = "pointwise_gpu.cu"
KINDS = {"silu": 1, "relu": 2, "gelu": 3, "mish": 4}  # numbers of device_gpu.cuh; 0: no activation
PREDICTIONS = {"eps": 0, "x0": 1, "v": 2}
NUMBERS = {np.dtype(t): i for i, t in enumerate((np.float32, np.float64, np.int32, np.int64))}
DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bfloat16": BF16}
NAMES = {DTYPES[name]: c for name, c in (("float32", "float"), ("float64", "double"), ("bfloat16", "bf16"))}
CHUNK = 1 << 14  # elements of a loss that one block adds up


def _each(kernel, x, *args):
    """A new array like x, from a kernel with a thread for every 16 bytes of it."""
    out = empty(x.shape, x.dtype)
    spread(HERE, kernel, x.size, 16 // x.dtype.itemsize, (out, *args), (element(x),))
    return out


def _here(array, dtype=None):
    """On the device: as it is, or copied there."""
    return array if on_device(array) else upload(np.asarray(array), dtype)


def _numbers(array):
    """One number per sample of any type that kernels read: the array, and which type it is."""
    array = _here(array)
    return array, NUMBERS[array.dtype]


def add(a, b):
    return _each("add", a, a, b)


def affine(x, a, b):
    return _each("affine", x, x, float(a), float(b))


def activation_forward(x, kind):
    return _each("activation_forward", x, x, KINDS[kind])


def activation_backward(dout, x, kind):
    return _each("activation_backward", x, dout, x, KINDS[kind])


def modulate_forward(x, emb, kind):
    grid, block, _, slab, defines = slabs(x, x.shape[-1], kind, parts=True)
    out = empty(x.shape, x.dtype)
    launch("norm_gpu.cu", "modulate_forward", grid, block, (x, emb, out, slab), 0, defines)
    return out


def modulate_backward(dout, x, emb, kind):
    grid, block, smem, slab, defines = slabs(x, x.shape[-1], kind)
    dx, demb = empty(x.shape, x.dtype), empty(emb.shape, emb.dtype)
    args = dout, x, emb, dx, demb, slab
    launch("norm_gpu.cu", "modulate_backward", grid, block, args, smem, defines)
    return dx, demb


def time_embedding(t, dim, flip_sin_to_cos, freq_shift, dtype=np.float32):
    out, rate = empty((t.shape[0], dim), dtype), -math.log(10000.0) / (dim // 2 - freq_shift)
    args = out, *_numbers(t), dim, np.float64(rate), bool(flip_sin_to_cos)
    spread(HERE, "time_embedding", out.size, 1, args, (element(out),))
    return out


def embedding_forward(labels, table):
    out = empty((*labels.shape, table.shape[1]), table.dtype)
    spread(HERE, "embedding_forward", out.size, 1, (out, *_numbers(labels), table, table.shape[1]))
    return out


def embedding_backward(dout, labels, dtable):
    args = dtable, dout, *_numbers(labels), *dout.shape
    spread(HERE, "embedding_backward", dtable.size, 1, args)


def dropout(x, rate, seed, step, site):
    samples, size, out = x.shape[0], math.prod(x.shape[1:]), empty(x.shape, x.dtype)
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    numbers = np.uint64(seed), *stepped(step), np.uint32(DROPOUT + 256 * site), threshold, 1 / (1 - rate)
    grid, args = (
        (-(-samples * -(-size // 4) // 256),),
        (out, x, np.uint32(samples), np.uint32(size), *numbers),
    )
    launch(HERE, "dropout", grid, (256,), args, defines=(element(x),))
    return out


def q_sample(x0, eps, a, s, prediction):
    xt, target, size = empty(x0.shape, x0.dtype), empty(x0.shape, x0.dtype), math.prod(x0.shape[1:])
    a, s = (_here(c, np.float32) for c in (a, s))
    args = xt, target, x0, eps, a, s, PREDICTIONS[prediction], np.uint32(size)
    spread(HERE, "q_sample", x0.size, 1, args, (element(x0),))
    return xt, target


def mse_loss(pred, target, weight=None):
    n, dpred, parts = pred.size, empty(pred.shape, pred.dtype), empty((-(-pred.size // CHUNK),), np.float64)
    weight = None if weight is None else _here(weight, np.float32)
    args = dpred, parts, pred, target, weight, np.uint32(n // pred.shape[0]), np.uint64(n), CHUNK, 2 / n
    launch(HERE, "mse_loss", parts.shape, (256,), args, defines=(element(pred),))
    return total(parts, n), dpred


def cast(x, dtype):
    dtype = DTYPES[dtype]
    if x.dtype == dtype:
        return x
    out = empty(x.shape, dtype)
    spread(HERE, "cast", x.size, 1, (out, x), (("FROM", NAMES[x.dtype]), ("TO", NAMES[dtype])))
    return out


def gather_images(images, chosen, mirrored):
    _, H, W, C = images.shape
    out = empty((chosen.shape[0], H, W, C), np.float32)
    args = out, images, *_numbers(chosen), _here(mirrored, np.uint8), *map(np.uint32, (W, C, H * W * C))
    spread(HERE, "gather_images", out.size, 1, args)
    return out


def sample_step(x, pred, z, c, limit):
    following, x0 = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    spread(HERE, "sample_step", x.size, 1, (following, x0, x, pred, z, _here(c, np.float32), float(limit)))
    return following, x0
