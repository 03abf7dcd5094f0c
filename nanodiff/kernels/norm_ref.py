"""Group norm, with or without SiLU behind it, in NumPy: the definition (Wu & He 2018, arXiv:1803.08494)."""

import numpy as np

from nanodiff.kernels.pointwise_ref import sigmoid

__all__ = ["groupnorm_forward", "groupnorm_again", "groupnorm_backward"]


def groupnorm_forward(x, weight, bias, groups, eps, silu):  # (B,H,W,C) -> (B,H,W,C), mean (B,G), rstd (B,G)
    """y = (x - mean) * rstd * weight + bias, statistics over the pixels and channels of each of `groups`
    groups; out = y, or y * sigmoid(y) with `silu`. mean and rstd = 1 / sqrt(variance + eps) are for the
    backward.
    """
    B, C = x.shape[0], x.shape[-1]
    split = x.reshape(B, -1, groups, C // groups)
    mean = split.mean((1, 3))
    rstd = 1 / np.sqrt(split.var((1, 3)) + eps)
    return groupnorm_again(x, mean, rstd, weight, bias, groups, silu), mean, rstd


def groupnorm_again(x, mean, rstd, weight, bias, groups, silu):  # -> (B,H,W,C)
    """The output of groupnorm_forward from what it returned: to be made again rather than kept."""
    y = _normalised(x, mean, rstd) * weight + bias
    return y * sigmoid(y) if silu else y


def _normalised(x, mean, rstd):
    split = x.reshape(x.shape[0], -1, mean.shape[1], x.shape[-1] // mean.shape[1])
    return ((split - mean[:, None, :, None]) * rstd[:, None, :, None]).reshape(x.shape)


def groupnorm_backward(dout, x, mean, rstd, weight, bias, groups, silu, dweight, dbias, residual=None):
    """dx for out = silu(y), y = norm * weight + bias, norm = (x - mean) * rstd; adds into dweight and dbias.

    silu(y) = y s with s = sigmoid(y), and ds/dy = s (1 - s), so        dy = dout * s * (1 + y * (1 - s))
    Parameters, summed over all pixels:                                dweight += dy * norm,  dbias += dy
    Every x of a group moves its mean and rstd. With n values in the group, dnorm = dy * weight, and
    dmean/dx_i = 1/n, drstd/dx_i = -rstd^2 norm_i / n (the derivative through mean sums to zero):
        directly        rstd * dnorm_i
        through mean   -rstd * sum(dnorm) / n
        through rstd   -rstd * norm_i * sum(dnorm * norm) / n
        dx_i = rstd * (dnorm_i - average(dnorm) - norm_i * average(dnorm * norm))
    norm and y are computed again: cheaper than keeping a second copy of x. residual, where given, is added to
    dx: it is the gradient that reached x by another way.
    """
    norm = _normalised(x, mean, rstd)
    dy = dout
    if silu:
        y = norm * weight + bias
        s = sigmoid(y)
        dy = dout * s * (1 + y * (1 - s))
    dweight += (dy * norm).sum((0, 1, 2))
    dbias += dy.sum((0, 1, 2))
    split = (x.shape[0], -1, groups, x.shape[-1] // groups)
    dnorm, norm = (dy * weight).reshape(split), norm.reshape(split)
    average = dnorm.mean((1, 3), keepdims=True)
    average_norm = (dnorm * norm).mean((1, 3), keepdims=True)
    dx = ((dnorm - average - norm * average_norm) * rstd[:, None, :, None]).reshape(x.shape)
    return dx if residual is None else dx + residual
