"""Convolutions on the CPU: on the matrix unit if there is one, by Winograd's method where that pays
(amx_winograd_cpu.py) or directly (amx_cpu.py); else by Winograd (winograd_cpu.py) or as gathered windows
times packed weights (gemm_cpu.py).

Maths: conv_ref.py. The choice is a matter of the machine and of shape alone.
"""

import numpy as np

from nanodiff.kernels import amx_cpu, amx_winograd_cpu
from nanodiff.kernels.gemm_cpu import convolve, packed, sums, weight_gradient
from nanodiff.kernels.parallel_cpu import AMX, DIRECT, empty, host, parallel, shared
from nanodiff.kernels.resample_cpu import upsample_backward, upsample_forward
from nanodiff.kernels.simd_cpu import PANEL
from nanodiff.kernels.sums_cpu import add_columns, widened, zeros
from nanodiff.kernels.winograd_cpu import transformed_weights, winograd, winograd_weight_gradient

__all__ = [
    "conv_prepare", "conv_forward", "conv_backward", "upconv_prepare", "upconv_forward", "upconv_backward",
]  # fmt: skip


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


# ---- a 3x3 convolution of images made twice as large ----
# Such an image has every pixel of x four times, so that of the three weights of a window along an axis two
# always meet the same pixel. With their sums,
#     K[u] = w[2], w[1] + w[2], w[0] + w[1], w[0],     u = 0 .. 3, and likewise along the other axis,
# output Y is the sum over the u for which Y + 1 - u = 2 y is even of x[y] K[u]: what the dx of a 4x4
# convolution of stride 2 does to dout, with 4/9 of the products. Hence
#     dx = that convolution of dout,     dK[u] = sum over y of x[y]^T dout[2 y + u - 1],
#     dw[i] = dK[2 - i] + dK[3 - i]      w[i] is in K[2 - i] and in K[3 - i]
SAME = 1, (1, 1)  # stride and border of the 3x3 convolution
DOUBLED = 4, 4, 2, (1, 1)


def uses_doubled(H, W, C):
    """On the matrix unit, where a pixel costs more than the weights, of which there are 16 for 9."""
    return AMX and 2 * H * W >= C


@parallel
def add_doubled(job, worker, weight, out):
    """out (16, C, O) = K of weight (9, C, O), for 8 rows of each tap."""
    _, C, O = weight.shape
    for c in range(8 * job, min(8 * job + 8, C)):
        for u in range(4):
            for v in range(4):
                to = out[4 * u + v, c]
                for o in range(O):
                    to[o] = 0
                for i in range(max(0, 2 - u), min(2, 3 - u) + 1):
                    for j in range(max(0, 2 - v), min(2, 3 - v) + 1):
                        run = weight[3 * i + j, c]
                        for o in range(O):
                            to[o] += run[o]


@parallel
def add_folded(job, worker, dK, dweight):
    """dweight (9, C, O) += what dK (16, C, O) says of it, for 8 rows of each tap."""
    _, C, O = dweight.shape
    for c in range(8 * job, min(8 * job + 8, C)):
        for i in range(3):
            for j in range(3):
                to = dweight[3 * i + j, c]
                for u in range(2 - i, 4 - i):
                    for v in range(2 - j, 4 - j):
                        run = dK[4 * u + v, c]
                        for o in range(O):
                            to[o] += run[o]


def doubled(weight):  # (3,3,C,O) -> K (16,C,O), until the next call
    C, O = weight.shape[2:]
    K = shared("doubled", (16, C, O))
    add_doubled(-(-C // 8), weight.reshape(9, C, O), K)
    return K


def upconv_prepare(weight, H, W):
    """As conv_prepare; or K as tiles, (O/32, C/32, 4, 4, 1024)."""
    if not uses_doubled(H, W, weight.shape[2]):
        return conv_prepare(weight, 2 * H, 2 * W, *SAME)
    tiles = amx_cpu.tile_weights(doubled(weight), amx_cpu.gradient_plan(1, 2 * H, 2 * W, *DOUBLED), keep=True)
    return tiles.reshape(*tiles.shape[:2], 4, 4, -1)


def upconv_forward(x, weight, bias):
    (B, H, W, C), O = x.shape, len(bias)
    if not uses_doubled(H, W, C):
        return conv_forward(upsample_forward(x), weight, bias, *SAME)
    plan, out = amx_cpu.gradient_plan(B, 2 * H, 2 * W, *DOUBLED), empty((B, 2 * H, 2 * W, O))
    amx_cpu.products(plan, x.reshape(-1, C), weight, bias[None], out.reshape(-1, O))
    return out


def upconv_backward(dout, x, weight, dweight, dbias):
    (B, H, W, C), O = x.shape, dout.shape[3]
    if not uses_doubled(H, W, C):
        dup, _ = conv_backward(dout, upsample_forward(x), weight, *SAME, dweight, dbias)
        return upsample_backward(dup)
    rows, pixels, dK, dx = dout.reshape(-1, O), x.reshape(-1, C), zeros((16, C, O)), empty(x.shape)
    for phase in np.ndindex(2, 2):
        back = amx_cpu.doubled_plan(B, H, W, *phase)
        add_columns(amx_cpu.weight_products(back, pixels, rows, dK, 4 * H * W), dbias)
    add_folded(-(-C // 8), dK, dweight.reshape(9, C, O))
    plan, zero = amx_cpu.forward_plan(B, 2 * H, 2 * W, *DOUBLED), np.zeros((1, C), np.float32)
    turned = amx_cpu.tile_weights(doubled(weight), plan, turned=True)
    amx_cpu.products(plan, rows, turned, zero, dx.reshape(-1, C))
    return dx
