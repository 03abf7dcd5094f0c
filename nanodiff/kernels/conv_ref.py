"""Convolution in NumPy: the definition. Any kernel size, stride and padding; `pad` = zeros (before, after)
both axes."""

import numpy as np

from nanodiff.kernels.resample_ref import upsample_backward, upsample_forward

__all__ = [
    "conv_prepare", "conv_forward", "conv_backward", "upconv_prepare", "upconv_forward", "upconv_backward",
]  # fmt: skip


def conv_prepare(weight, H, W, stride=1, pad=(0, 0)):
    """The weights in the form that `conv_forward` reads on images of H x W; here they stay as they are."""
    return weight


def _windows(x, kh, kw, stride):  # (B, H, W, C) -> (B, Ho, Wo, C, kh, kw), a view
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    return windows[:, ::stride, ::stride]


def conv_forward(x, weight, bias, stride=1, pad=(0, 0), emb=None, residual=None):  # (B,H,W,C) -> (B,Ho,Wo,O)
    """out[b, y, x] = bias + emb[b] + sum_(i,j) xp[b, y*stride + i, x*stride + j] @ weight[i, j], xp = x
    padded.

    weight (kh, kw, C, O). emb (B, O) is added to every pixel of its image, residual (B, Ho, Wo, O) pixel by
    pixel: a block's time embedding and its shortcut, without passes over memory of their own.
    """
    xp = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    out = (
        np.einsum("byxcij,ijco->byxo", _windows(xp, *weight.shape[:2], stride), weight, optimize=True) + bias
    )
    out = out if emb is None else out + emb[:, None, None]
    return out if residual is None else out + residual


def conv_backward(dout, x, weight, stride, pad, dweight, dbias, wants_dx=True):  # -> dx (B,H,W,C), demb (B,O)
    """dx (None unless wanted) and demb for the forward above; adds into dweight and dbias.

    Written with the padded input xp, every output is a sum over taps (i, j):
        out[b, y, x] = sum_(i,j) xp[b, y s + i, x s + j] @ weight[i, j] + bias + emb[b]
    For a fixed tap this is a linear layer on a strided view of xp, so its three gradients are those of a
    linear layer:
        dweight[i, j] += sum_(b,y,x) xp[b, y s + i, x s + j]^T dout[b, y, x]
        dxp[b, y s + i, x s + j] += dout[b, y, x] @ weight[i, j]^T        (a sum: windows overlap)
        demb[b] = sum_(y,x) dout[b, y, x],   dbias += sum_b demb[b]
    Zeros that padding added are no input: dx = dxp without its border.
    """
    kh, kw = weight.shape[:2]
    xp = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    dweight += np.einsum("byxcij,byxo->ijco", _windows(xp, kh, kw, stride), dout, optimize=True)
    demb = dout.sum((1, 2))
    dbias += demb.sum(0)
    if not wants_dx:
        return None, demb
    dxp = np.zeros_like(xp)
    for i in range(kh):
        for j in range(kw):
            rows, cols = (
                slice(i, i + stride * dout.shape[1], stride),
                slice(j, j + stride * dout.shape[2], stride),
            )
            dxp[:, rows, cols] += dout @ weight[i, j].T
    dx = dxp[:, pad[0] : pad[0] + x.shape[1], pad[0] : pad[0] + x.shape[2]]
    return np.ascontiguousarray(dx), demb


def upconv_prepare(weight, H, W):
    """The weights in the form that `upconv_forward` reads on images of H x W; here they stay as they are."""
    return weight


def upconv_forward(x, weight, bias):  # (B,H,W,C) -> (B,2H,2W,O)
    """A 3x3 convolution (3,3,C,O) of x made twice as large, with a border of zeros that keeps the size."""
    return conv_forward(upsample_forward(x), weight, bias, 1, (1, 1))


def upconv_backward(dout, x, weight, dweight, dbias):  # -> dx (B,H,W,C)
    """dx for the forward above, the backwards of both one after the other; adds into dweight and dbias."""
    dup, _ = conv_backward(dout, upsample_forward(x), weight, 1, (1, 1), dweight, dbias)
    return upsample_backward(dup)
