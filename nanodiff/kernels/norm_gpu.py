"""Group norm on the GPU: one launch forward; backward one, and one for the parameters. Maths: norm_ref.py."""

import math

import numpy as np

from nanodiff.kernels.device_gpu import element, empty, launch

__all__ = ["groupnorm_forward", "groupnorm_again", "groupnorm_backward"]

SLAB = np.dtype([(n, np.int32) for n in "pixels C D width rows columns chunk".split()])
THREADS = 256  # of a block, at most
WIDE = 32  # channels that a slab has at the least: 64 bytes of memory in a row, also in bfloat16


def slabs(x, groups, kind, parts=False):
    """grid, block, bytes of shared memory, Slab and defines for the kernels of norm_gpu.cu (see there).

    kind: of the activation. parts: an image's pixels need not be of one block. Nothing but the grid depends
    on the number of images.
    """
    B, C, pixels = x.shape[0], x.shape[-1], math.prod(x.shape[1:-1])
    D, lanes = C // groups, 16 // x.dtype.itemsize
    lanes = lanes // 2 if kind in ("gelu", "mish") else lanes  # whose functions need the registers
    vector = 1 if C % lanes else lanes
    whole = math.lcm(D, vector)
    width = min(C, whole * -(-WIDE // whole))
    columns = min(width // vector, THREADS)
    rows = max(1, min(THREADS // columns, pixels))
    chunk = min(pixels, 16 * rows) if parts else pixels
    grid = -(-C // width), B, -(-pixels // chunk)
    slab = np.array([(pixels, C, D, width, rows, columns, chunk)], SLAB)
    smem = 4 * (2 * rows * width + 2 * (width // D))
    return (
        grid,
        (-(-rows * columns // 32) * 32,),
        smem,
        slab,
        (element(x), ("VEC", vector), ("KIND", kind.upper())),
    )


def _kind(silu):
    return "silu" if silu else "none"


def groupnorm_forward(x, weight, bias, groups, eps, silu):
    grid, block, smem, slab, defines = slabs(x, groups, _kind(silu))
    out = empty(x.shape, x.dtype)
    mean, rstd = (empty((x.shape[0], groups), np.float32) for _ in range(2))
    args = x, weight, bias, out, mean, rstd, slab, float(eps)
    launch("norm_gpu.cu", "groupnorm_forward", grid, block, args, smem, defines)
    return out, mean, rstd


def groupnorm_again(x, mean, rstd, weight, bias, groups, silu):
    grid, block, _, slab, defines = slabs(x, groups, _kind(silu), parts=True)
    out = empty(x.shape, x.dtype)
    args = x, mean, rstd, weight, bias, out, slab
    launch("norm_gpu.cu", "groupnorm_again", grid, block, args, 0, defines)
    return out


def groupnorm_backward(dout, x, mean, rstd, weight, bias, groups, silu, dweight, dbias, residual=None):
    grid, block, smem, slab, defines = slabs(x, groups, _kind(silu))
    B, C = x.shape[0], x.shape[-1]
    dx, shares = empty(x.shape, x.dtype), empty((B, 2, C), np.float32)
    args = dout, x, mean, rstd, weight, bias, residual, dx, shares, slab
    launch("norm_gpu.cu", "groupnorm_backward", grid, block, args, smem, defines)
    launch(
        "norm_gpu.cu", "add_shares", (-(-2 * C // 32),), (256,), (shares, dweight, dbias, B, C), 0, defines
    )
    return dx
