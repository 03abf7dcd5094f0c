"""Attention on the GPU: its products as batches of matrix products, one for each image and head. Maths:
attention_ref.py.

The (N, N) arrays of scores exist for as many images at a time as fit into SCORES elements: no more than that
is ever held, and for the usual sizes they stay in the cache between two kernels.
"""

import numpy as np

from nanodiff.kernels.device_gpu import element, empty, launch
from nanodiff.kernels.gemm_gpu import multiply

__all__ = ["attention_forward", "attention_backward"]

SCORES = 1 << 25


def _chunks(B, N, heads):
    """Slices of images whose scores, and whose number of batches, stay below the limits."""
    step = max(1, min(B, SCORES // (N * N * heads), 65535 // heads))
    return [slice(b, min(b + step, B)) for b in range(0, B, step)]


def _product(layout, a, b, out, heads, **options):
    """For each image and head, of "wide" arrays (B, N, C) and "square" ones (B * heads, N, N):
    NT wide wide^T -> square, NN square wide -> wide, TN square^T wide -> wide; b is always wide."""
    B, N, C = b.shape
    D = C // heads
    wide, square = (C, N * C, D), (N, heads * N * N, N * N)  # from row to row, image to image, head to head
    columns, length, a_steps, out_steps = (N, D, wide, square) if layout == "NT" else (D, N, square, wide)
    names = "lda a_image a_head ldb b_image b_head ldo o_image o_head".split()
    steps = dict(zip(names, a_steps + wide + out_steps))
    multiply(
        layout, a, b, out, batches=B * heads, N=columns, C=length, W=N, OW=N, heads=heads, **steps, **options
    )


def _by_rows(kernel, x, rows, *args):
    """A kernel of attention_gpu.cu, in which a warp makes a row; x: an array of the type of q."""
    launch("attention_gpu.cu", kernel, (-(-rows // 8),), (256,), (*args, rows), defines=(element(x),))


def attention_forward(q, k, v, heads):
    """Tensor cores take the softmax rounded to bfloat16; its sums and lse are float32."""
    B, N, C = q.shape
    out, lse = empty(q.shape, q.dtype), empty((B, heads, N), np.float32)
    for b in _chunks(B, N, heads):
        square = ((b.stop - b.start) * heads, N, N)
        scores, p = empty(square, np.float32), empty(square, q.dtype)
        _product("NT", q[b], k[b], scores, heads)
        _by_rows("softmax", q, square[0] * N, scores, p, lse[b], N, (C // heads) ** -0.5)
        _product("NN", p, v[b], out[b], heads)
    return out, lse


def attention_backward(dout, q, k, v, out, lse, heads):
    B, N, C = q.shape
    scale = (C // heads) ** -0.5
    made = empty((3, *q.shape), q.dtype)
    dq, dk, dv = made
    delta = empty(lse.shape, np.float32)
    _by_rows("row_products", q, lse.size, dout, out, delta, N, heads, C // heads)
    for b in _chunks(B, N, heads):
        square = ((b.stop - b.start) * heads, N, N)
        p, ds = empty(square, q.dtype), empty(square, q.dtype)
        _product("NT", q[b], k[b], p, heads, epilogue="SOFTMAX", rows=lse[b], alpha=scale)
        _product("TN", p, dout[b], dv[b], heads)
        _product("NT", dout[b], v[b], ds, heads, epilogue="DSOFTMAX", rows=delta[b], residual=p)
        _product("NN", ds, k[b], dq[b], heads, alpha=scale)
        _product("TN", ds, q[b], dk[b], heads, alpha=scale)
    return made
