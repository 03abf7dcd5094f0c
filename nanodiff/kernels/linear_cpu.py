"""Linear layers on the CPU: 1x1 convolutions of an image one pixel high. Maths: linear_ref.py; the machinery:
amx_cpu.py on a matrix unit, else gemm_cpu.py."""

import numpy as np

from nanodiff.kernels import amx_cpu
from nanodiff.kernels.gemm_cpu import convolve, packed, sums, weight_gradient
from nanodiff.kernels.parallel_cpu import AMX, empty
from nanodiff.kernels.sums_cpu import add_rows

__all__ = ["linear_forward", "linear_backward"]

HERE = np.zeros((1, 2), np.int64)  # a linear layer is a convolution with one tap: the pixel itself


def _as_image(x):  # (..., C) -> (1, 1, N, C)
    return x.reshape(1, 1, -1, x.shape[-1])


def _stack(x, weight):  # (..., C), (C, O) or (S, C, O) -> rows (1, 1, N, C), weight (S, C, O), N, S
    rows, stack = _as_image(x), weight.reshape(-1, *weight.shape[-2:])
    return rows, stack, rows.shape[2], len(stack)


def linear_forward(x, weight, bias, residual=None):
    rows, stack, N, S = _stack(x, weight)
    O, out = weight.shape[-1], empty((*weight.shape[:-2], *x.shape[:-1], weight.shape[-1]))
    bias = bias.reshape(S, O)
    if AMX:
        plan = amx_cpu.stack_plans(N, S)[0]
        packs = amx_cpu.tile_weights(stack, plan)
        amx_cpu.products(plan, rows[0, 0], packs, bias, out.reshape(-1, O), residual)
        return out
    for s, made in enumerate(out.reshape(S, 1, 1, N, O)):
        convolve(rows, packed(stack[s : s + 1]), bias[s : s + 1], made, HERE, N, N, residual=residual)
    return out


def linear_backward(dout, x, weight, dweight, dbias):
    rows, stack, N, S = _stack(x, weight)
    (C, O), drows, dstack = weight.shape[-2:], dout.reshape(-1, dout.shape[-1]), dweight.reshape(stack.shape)
    # dbias: a sum of sums, more precise than one
    zero, groups = np.zeros((1, C), np.float32), next(g for g in range(min(16, N), 0, -1) if N % g == 0)
    if AMX:
        _, plan, back = amx_cpu.stack_plans(N, S)
        parts, dx = amx_cpu.weight_products(back, rows[0, 0], drows, dstack, N // groups), empty(x.shape)
        turned = amx_cpu.tile_weights(stack, plan, turned=True)
        amx_cpu.products(plan, drows, turned, zero, dx.reshape(N, C))
    else:
        parts, dx = sums(drows, S * groups), None
        for s, d in enumerate(drows.reshape(S, 1, 1, N, O)):
            before, dx = dx, empty(x.shape)
            turned = packed(stack[s : s + 1], transposed=True)
            convolve(d, turned, zero, _as_image(dx), HERE, N, N, residual=before)
            weight_gradient(rows, d, dstack[s], HERE)
    add_rows(1, parts.reshape(-1), 0, groups * O, O, groups, O, dbias.reshape(S, O), 1)
    return dx
