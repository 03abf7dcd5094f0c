"""Linear layers on the GPU: convolutions of one tap on an image one row high. Maths: linear_ref.py."""

from nanodiff.kernels.device_gpu import empty
from nanodiff.kernels.gemm_gpu import add_gradients, multiply, operand

__all__ = ["linear_forward", "linear_backward"]


def linear_forward(x, weight, bias, residual=None):
    C, O = weight.shape[-2:]
    rows, out = x.size // C, empty((*weight.shape[:-2], *x.shape[:-1], O), x.dtype)
    for w, b, y in zip(weight.reshape(-1, C, O), bias.reshape(-1, O), out.reshape(-1, rows, O)):
        multiply("NN", x, operand(w, x.dtype), y, b, None, residual, N=O, C=C, lda=C, ldb=O, ldo=O, W=rows,
                 OW=rows)  # fmt: skip
    return out


def linear_backward(dout, x, weight, dweight, dbias):
    C, O = weight.shape[-2:]
    rows, dx = x.size // C, None
    layer = dict(kh=1, kw=1, N=O, C=C, lda=C, ldb=O, ldo=O, W=rows, OW=rows)
    stack = (a.reshape(-1, C, O) for a in (weight, dweight))
    for d, w, dw, db in zip(dout.reshape(-1, rows, O), *stack, dbias.reshape(-1, O)):
        before, dx = dx, empty(x.shape, x.dtype)
        add_gradients(layer, x, d, dw, db, 256)
        multiply("NT", d, operand(w, x.dtype), dx, None, None, before, N=C, C=O, lda=O, ldb=O, ldo=C, W=rows,
                 OW=rows)  # fmt: skip
    return dx
