"""Convolutions on the GPU, as matrix products that gather their windows. Maths: conv_ref.py, gemm_gpu.cu."""

from nanodiff.kernels.device_gpu import empty
from nanodiff.kernels.gemm_gpu import add_gradients, multiply, operand
from nanodiff.kernels.resample_gpu import upsample_backward, upsample_forward

__all__ = [
    "conv_prepare", "conv_forward", "conv_backward", "upconv_prepare", "upconv_forward", "upconv_backward",
]  # fmt: skip


def conv_prepare(weight, H, W, stride=1, pad=(0, 0)):
    """The weights as they are: the kernels read (kh, kw, C, O) in either direction."""
    return weight


def conv_forward(x, weight, bias, stride=1, pad=(0, 0), emb=None, residual=None):
    """x and residual float32 or bfloat16 as out; bias, emb and the weights float32."""
    B, H, W, C = x.shape
    kh, kw, _, O = weight.shape
    OH, OW = (H + sum(pad) - kh) // stride + 1, (W + sum(pad) - kw) // stride + 1
    out = empty((B, OH, OW, O), x.dtype)
    multiply("NN", x, operand(weight, x.dtype), out, bias, emb, residual, images=B, N=O, C=C, lda=C, ldb=O,
             ldo=O, H=H, W=W, OH=OH, OW=OW, kh=kh, kw=kw, stride=stride, pad=pad[0])  # fmt: skip
    return out


def conv_backward(
    dout, x, weight, stride, pad, dweight, dbias, wants_dx=True
):  # -> dx like x, demb (B,O) float32
    B, H, W, C = x.shape
    kh, kw, _, O = weight.shape
    OH, OW = dout.shape[1:3]
    window = dict(images=B, kh=kh, kw=kw, stride=stride, pad=pad[0])
    forward = dict(H=H, W=W, OH=OH, OW=OW, N=O, C=C, lda=C, ldb=O, ldo=O)
    demb = add_gradients(window | forward, x, dout, dweight, dbias, OH * OW)
    if not wants_dx:
        return None, demb
    dx = empty(x.shape, x.dtype)
    back = dict(H=OH, W=OW, OH=H, OW=W, N=C, C=O, lda=O, ldb=O, ldo=C, parts=stride * stride)
    multiply("NT", dout, operand(weight, x.dtype), dx, **window, **back)
    return dx, demb


def upconv_prepare(weight, H, W):
    return weight


def upconv_forward(x, weight, bias):
    return conv_forward(upsample_forward(x), weight, bias, 1, (1, 1))


def upconv_backward(dout, x, weight, dweight, dbias):
    dup, _ = conv_backward(dout, upsample_forward(x), weight, 1, (1, 1), dweight, dbias)
    return upsample_backward(dup)
