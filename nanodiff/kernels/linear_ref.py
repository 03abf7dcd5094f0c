"""Linear layer in NumPy: the definition."""

import numpy as np

__all__ = ["linear_forward", "linear_backward"]


def linear_forward(x, weight, bias, residual=None):  # (..., C), (C, O), (O,) -> (..., O)
    """out = x @ weight + bias (+ residual) over the last axis.

    weight (S, C, O) and bias (S, O) are a stack, S layers of the same input: out (S, ..., O), no residual.
    """
    if weight.ndim == 3:
        return np.stack([linear_forward(x, *layer) for layer in zip(weight, bias)])
    out = x @ weight + bias
    return out if residual is None else out + residual


def linear_backward(dout, x, weight, dweight, dbias):  # -> dx (..., C)
    """dx for out[n, o] = sum_c x[n, c] weight[c, o] + bias[o]; adds into dweight and dbias.

    With L the loss and dout = dL/dout, the chain rule sums over every out that a value entered:
        dx[n, c]     = sum_o dout[n, o] weight[c, o]       x[n, c] enters row n of out
        dweight[c,o] = sum_n x[n, c] dout[n, o]            weight[c, o] enters column o
        dbias[o]     = sum_n dout[n, o]
    In matrices: dweight += x^T dout, dbias += sum dout, dx = dout weight^T. In a stack x entered S layers: dx
    is the sum of theirs.
    """
    if weight.ndim == 3:
        stack = zip(dout, weight, dweight, dbias)
        return sum(linear_backward(d, x, w, dw, db) for d, w, dw, db in stack)
    rows, drows = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
    dweight += rows.T @ drows
    dbias += drows.sum(0)
    return dout @ weight.T
