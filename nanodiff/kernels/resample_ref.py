"""Nearest up-sampling, and the joining and parting of channels, in NumPy: the definition.

Down-sampling is a convolution of stride 2 (conv_ref.py).
"""

import numpy as np

__all__ = ["upsample_forward", "upsample_backward", "concat", "split"]


def upsample_forward(x):  # (B,H,W,C) -> (B,2H,2W,C)
    """out[y, x] = x[y // 2, x // 2]."""
    return x.repeat(2, 1).repeat(2, 2)


def upsample_backward(dout):  # (B,2H,2W,C) -> (B,H,W,C)
    """dx for out[y, x] = x[y // 2, x // 2]: each pixel went to four, so dx is the sum of their gradients."""
    B, H, W, C = dout.shape
    return dout.reshape(B, H // 2, 2, W // 2, 2, C).sum((2, 4))


def concat(a, b):  # (B,H,W,C), (B,H,W,D) -> (B,H,W,C+D)
    """The channels of a, then those of b."""
    return np.concatenate([a, b], -1)


def split(x, C):  # (B,H,W,C+D) -> (B,H,W,C), (B,H,W,D)
    """The backward of `concat`: the first C channels and the rest."""
    return np.ascontiguousarray(x[..., :C]), np.ascontiguousarray(x[..., C:])
