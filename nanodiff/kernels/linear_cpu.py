"""Linear layers on the CPU: 1x1 convolutions of an image one pixel high. Maths: linear_ref.py; the machinery:
amx_cpu.py on a matrix unit, else gemm_cpu.py."""

import numpy as np

from nanodiff.kernels import amx_cpu
from nanodiff.kernels.gemm_cpu import convolve, packed, sums, weight_gradient
from nanodiff.kernels.parallel_cpu import AMX, empty
from nanodiff.kernels.sums_cpu import add_columns

__all__ = ["linear_forward", "linear_backward"]

HERE = np.zeros((1, 2), np.int64)  # a linear layer is a convolution with one tap: the pixel itself


def _as_image(x):  # (..., C) -> (1, 1, N, C)
    return x.reshape(1, 1, -1, x.shape[-1])


def linear_forward(x, weight, bias, residual=None):
    rows, out = _as_image(x), empty((*x.shape[:-1], weight.shape[1]))
    N = rows.shape[2]
    if AMX:
        plan = amx_cpu.forward_plan(1, 1, N, 1, 1, 1, (0, 0))
        packs, flat = amx_cpu.tile_weights(weight[None], plan), _as_image(out)[0, 0]
        amx_cpu.products(plan, rows[0, 0], packs, bias[None], flat, residual)
        return out
    convolve(rows, packed(weight[None]), bias[None], _as_image(out), HERE, N, N, residual=residual)
    return out


def linear_backward(dout, x, weight, dweight, dbias):
    rows, drows, dx = _as_image(x), _as_image(dout), empty(x.shape)
    N, C = rows.shape[2:]
    zero, groups = np.zeros((1, C), np.float32), min(16, N)  # dbias: a sum of sums, more precise than one
    if AMX:
        plan = amx_cpu.forward_plan(1, 1, N, 1, 1, 1, (0, 0))
        parts = amx_cpu.weight_products(plan, rows[0, 0], drows[0, 0], dweight[None], -(-N // groups))
        add_columns(parts, dbias)
        turned = amx_cpu.tile_weights(weight[None], plan, turned=True)
        amx_cpu.products(plan, drows[0, 0], turned, zero, _as_image(dx)[0, 0])
        return dx
    add_columns(sums(drows[0, 0], groups), dbias)
    convolve(drows, packed(weight[None], transposed=True), zero, _as_image(dx), HERE, N, N)
    weight_gradient(rows, drows, dweight, HERE)
    return dx
