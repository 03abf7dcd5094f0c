"""Linear layers on the GPU: convolutions of one tap on an image one row high. Maths: linear_ref.py."""

from nanodiff.kernels.device_gpu import empty
from nanodiff.kernels.gemm_gpu import add_gradients, multiply, operand

__all__ = ["linear_forward", "linear_backward"]


def linear_forward(x, weight, bias, residual=None):
    C, O = weight.shape
    rows, out = x.size // C, empty((*x.shape[:-1], O), x.dtype)
    multiply("NN", x, operand(weight, x.dtype), out, bias, None, residual, N=O, C=C, lda=C, ldb=O, ldo=O,
             W=rows, OW=rows)  # fmt: skip
    return out


def linear_backward(dout, x, weight, dweight, dbias):
    C, O = weight.shape
    rows, dx = x.size // C, empty(x.shape, x.dtype)
    layer = dict(kh=1, kw=1, N=O, C=C, lda=C, ldb=O, ldo=O, W=rows, OW=rows)
    add_gradients(layer, x, dout, dweight, dbias, 256)
    multiply("NT", dout, operand(weight, x.dtype), dx, N=C, C=O, lda=O, ldb=O, ldo=C, W=rows, OW=rows)
    return dx
