"""Multi-head self-attention over pixels in NumPy: the definition (Vaswani et al. 2017, arXiv:1706.03762, eq.
1)."""

import numpy as np

__all__ = ["attention_forward", "attention_backward"]


def _heads(x, heads):  # (B, N, C) -> (B, heads, N, D)
    B, N, C = x.shape
    return x.reshape(B, N, heads, C // heads).transpose(0, 2, 1, 3)


def _merge(x):  # (B, heads, N, D) -> (B, N, C)
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(x.shape[0], x.shape[2], -1)


def attention_forward(q, k, v, heads):  # three times (B,N,C) -> out (B,N,C), lse (B,heads,N)
    """out = softmax(q k^T / sqrt(D)) v in each head; head h owns columns h*D .. (h+1)*D, D = C / heads.

    lse[n] = log sum_m exp(q_n k_m / sqrt(D)) is all that the backward needs to make the softmax again.
    """
    qh, kh, vh = (_heads(a, heads) for a in (q, k, v))
    scores = qh @ kh.swapaxes(2, 3) * qh.shape[-1] ** -0.5
    top = scores.max(-1, keepdims=True)
    lse = top + np.log(np.exp(scores - top).sum(-1, keepdims=True))
    return _merge(np.exp(scores - lse) @ vh), lse[..., 0]


def attention_backward(dout, q, k, v, out, lse, heads):  # -> dq, dk, dv: (3,B,N,C)
    """Gradients of out = p v, p = softmax(s), s = a q k^T, a = 1 / sqrt(D), for each head.

    out = p v is a matrix product:                        dv = p^T dout,   dp = dout v^T
    softmax, row by row: dp_j/ds_i = p_j (1[i=j] - p_i), so
        ds_i = p_i (dp_i - sum_j p_j dp_j),   and   sum_j p_j dp_j = sum_j p_j (dout . v_j) = dout . out
    s = a q k^T is a product again:                       dq = a ds k,     dk = a ds^T q
    p is made again from lse, p = exp(s - lse): an (N, N) array is never kept.
    """
    qh, kh, vh, oh, doh = (_heads(a, heads) for a in (q, k, v, out, dout))
    scale = qh.shape[-1] ** -0.5
    p = np.exp(qh @ kh.swapaxes(2, 3) * scale - lse[..., None])
    dv = p.swapaxes(2, 3) @ doh
    dp = doh @ vh.swapaxes(2, 3)
    ds = p * (dp - (doh * oh).sum(-1, keepdims=True))
    return np.stack([_merge(scale * (ds @ kh)), _merge(scale * (ds.swapaxes(2, 3) @ qh)), _merge(dv)])
