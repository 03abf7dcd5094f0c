"""Convolutions on the CPU: on the matrix unit if there is one, by Winograd's method where that pays
(amx_winograd_cpu.py) or directly (amx_cpu.py); else by Winograd (winograd_cpu.py) or as gathered windows
times packed weights (gemm_cpu.py).

Maths: conv_ref.py. The choice is a matter of the machine and of shape alone.
"""

import numpy as np

from nanodiff.kernels import amx_cpu, amx_winograd_cpu
from nanodiff.kernels.gemm_cpu import convolve, packed, sums, weight_gradient
from nanodiff.kernels.parallel_cpu import AMX, DIRECT, empty, host
from nanodiff.kernels.simd_cpu import PANEL
from nanodiff.kernels.sums_cpu import add_columns, widened
from nanodiff.kernels.winograd_cpu import transformed_weights, winograd, winograd_weight_gradient

__all__ = ["conv_prepare", "conv_forward", "conv_backward"]


def uses_winograd(shape, H, W, stride, pad):
    """3x3, same size, whole panels of channels, and images of which a 4x4 tile covers little that is not
    there."""
    kh, kw, C, O = shape
    same = (kh, kw, stride, *pad) == (3, 3, 1, 1, 1)
    return same and C % PANEL == 0 and O % PANEL == 0 and min(H, W) >= 6 and not DIRECT


def uses_rows(shape, H, W, stride, pad):
    """On the matrix unit: likewise, for whole blocks of 32 channels and rows of four or more whole tiles. In
    smaller images the error would exceed 1e-5 (the border is most of them, where sums have fewer terms), and
    the weights, of which there are twice as many, would be most of the work."""
    kh, kw, C, O = shape
    same = (kh, kw, stride, *pad) == (3, 3, 1, 1, 1)
    return same and C % 32 == 0 and O % 32 == 0 and W % 4 == 0 and W >= 16 and H >= 8


def _taps(kh, kw):
    return np.array([(i, j, i * kw + j) for i in range(kh) for j in range(kw)], np.int64)


def conv_prepare(weight, H, W, stride=1, pad=(0, 0)):
    """The weights as the method that this machine takes for images of H x W reads them: tiles of bfloat16
    pairs, (O/32, C/32, kh, kw, 1024) or transformed (O/32, 6, 3 C/32, 1024); Winograd-transformed (O/16, 36,
    C+1, 16); or packed (O/16, kh, kw, C, 16)."""
    kh, kw, C, O = weight.shape
    if AMX:
        if uses_rows(weight.shape, H, W, stride, pad):
            return amx_winograd_cpu.row_weights(weight, keep=True)
        plan = amx_cpu.forward_plan(1, H, W, kh, kw, stride, tuple(pad))
        tiles = amx_cpu.tile_weights(weight.reshape(-1, C, O), plan, keep=True)
        return tiles.reshape(*tiles.shape[:2], kh, kw, -1)
    if uses_winograd(weight.shape, H, W, stride, pad):
        return transformed_weights(weight)
    return packed(weight.reshape(-1, C, O)).reshape(-1, kh, kw, C, PANEL)


def conv_forward(x, weight, bias, stride=1, pad=(0, 0), emb=None, residual=None):
    bias = bias[None] if emb is None else widened(emb, len(bias), bias)
    if AMX:
        if weight.ndim == 4:
            return amx_winograd_cpu.row_conv(x, weight, bias, residual)
        B, H, W, C = x.shape
        kh, kw = weight.shape[2:4]
        OH, OW = (H + sum(pad) - kh) // stride + 1, (W + sum(pad) - kw) // stride + 1
        plan = amx_cpu.forward_plan(B, H, W, kh, kw, stride, tuple(pad))
        out = empty((B, OH, OW, bias.shape[1]))
        amx_cpu.products(plan, x.reshape(-1, C), weight, bias, out.reshape(-1, bias.shape[1]), residual)
        return out
    if weight.ndim == 4:
        return winograd(x, weight, bias, residual)
    B, H, W, C = x.shape
    P, kh, kw = weight.shape[:3]
    OH, OW = (H + sum(pad) - kh) // stride + 1, (W + sum(pad) - kw) // stride + 1
    out, taps = empty((B, OH, OW, bias.shape[1])), _taps(kh, kw)
    taps[:, :2] -= pad[0]
    convolve(
        x, weight.reshape(P, kh * kw, C, PANEL), bias, out, taps, OW, OH * OW, scale=stride, residual=residual
    )
    return out


def conv_backward(dout, x, weight, stride, pad, dweight, dbias, wants_dx=True):
    B, H, W, C = x.shape
    kh, kw, _, O = weight.shape
    if AMX:
        if uses_rows(weight.shape, H, W, stride, pad):
            demb = amx_winograd_cpu.row_weight_gradient(x, dout, dweight)
            add_columns(demb, dbias)
            if not wants_dx:
                return None, demb
            turned = amx_winograd_cpu.row_weights(weight, turned=True)
            return amx_winograd_cpu.row_conv(dout, turned, np.zeros((1, C), np.float32)), demb
        shape, rows = (B, H, W, kh, kw, stride, tuple(pad)), dout.reshape(-1, O)
        flat = weight.reshape(-1, *weight.shape[2:])
        gradient, area = dweight.reshape(flat.shape), dout.shape[1] * dout.shape[2]
        demb = amx_cpu.weight_products(
            amx_cpu.weight_plan(*shape), x.reshape(B * H * W, -1), rows, gradient, area
        )
        add_columns(demb, dbias)
        if not wants_dx:
            return None, demb
        plan, zero, dx = amx_cpu.gradient_plan(*shape), np.zeros((1, C), np.float32), empty(x.shape)
        turned = amx_cpu.tile_weights(flat, plan, turned=True)
        amx_cpu.products(plan, rows, turned, zero, dx.reshape(B * H * W, -1))
        return dx, demb
    demb = sums(dout.reshape(-1, O), B)
    add_columns(demb, dbias)
    if uses_winograd(weight.shape, H, W, stride, pad):
        winograd_weight_gradient(x, dout, dweight)
        if not wants_dx:
            return None, demb
        return winograd(dout, transformed_weights(weight, turned=True), np.zeros((1, C), np.float32)), demb
    taps = _taps(kh, kw)
    taps[:, :2] -= pad[0]
    weight_gradient(x, dout, dweight.reshape(-1, O), taps, scale=stride)
    return _data_gradient(dout, (B, H, W, C), weight, stride, pad) if wants_dx else None, demb


def _data_gradient(dout, shape, weight, stride, pad):
    """dx[y] = sum of dout[(y + pad - i) / stride] @ weight[i]^T over the taps i for which that is a whole
    number.

    Which taps those are depends on y % stride: each of the stride * stride classes of pixels is a product of
    its own.
    """
    B, H, W, C = shape
    kh, kw, _, O = weight.shape
    dx, flat, zero = empty(shape), weight.reshape(-1, C, O), np.zeros((1, C), np.float32)
    for oy in range(min(stride, H)):
        for ox in range(min(stride, W)):
            fits = [
                (pad[0] - i, pad[0] - j, i * kw + j)
                for i in range(kh)
                for j in range(kw)
                if (oy + pad[0] - i) % stride == 0 and (ox + pad[0] - j) % stride == 0
            ]
            gh, gw = -(-(H - oy) // stride), -(-(W - ox) // stride)
            if not fits:  # a kernel smaller than its stride leaves pixels that nothing looked at
                host(lambda gap=dx[:, oy::stride, ox::stride]: gap.fill(0) or ())
                continue
            taps = np.array(fits, np.int64)
            turned = packed(flat, taps[:, 2].copy(), transposed=True)
            scale = 1 if stride == 1 else -stride
            convolve(dout, turned, zero, dx, taps, gw, gh * gw, scale, grid=stride, offset=(oy, ox))
    return dx
