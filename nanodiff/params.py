"""All weights of a network in one flat array, all their gradients in another, with named views into both.

One array means that zeroing, the gradient norm, Adam and the average of the weights are one pass each.
"""

import math

import numpy as np

from nanodiff.kernels.random_ref import INIT, random_bits

ALIGN = 16  # floats: every tensor starts on a cache line


def _aligned_zeros(n, dtype):
    memory = np.zeros(n * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n * np.dtype(dtype).itemsize].view(dtype)


class Param:
    """One named tensor: `data` and `grad` are views into the flat arrays."""

    def __init__(self, name, shape, init, start):
        self.name, self.shape, self.init, self.start = name, shape, init, start
        self.size = math.prod(shape)
        self.data = self.grad = None

    def __repr__(self):
        return f"Param({self.name!r}, {self.shape})"


class Params:
    """Layers `add` or `stack` their tensors; `allocate` lays them end to end and initialises them.

    data, grad   flat arrays of the device (the few floats between two tensors stay 0)
    count        number of weights
    """

    def __init__(self):
        self._named, self._stacks, self._end, self.ctx = {}, [], 0, None
        self.data = self.grad = None

    def add(self, name, shape, init):
        """A tensor called `name`. init: "one", "zero", or a number w: uniform in [-w, w)."""
        self._named[name] = param = Param(name, tuple(shape), init, self._end)
        self._end += -(-param.size // ALIGN) * ALIGN
        return param

    def stack(self, names, shape, init):
        """One tensor, (len(names), *shape), whose slices have names."""
        stack = Param(f"{names[0]}..", (len(names), *shape), init, self._end)
        for i, name in enumerate(names):
            self._named[name] = Param(name, tuple(shape), init, self._end + i * math.prod(shape))
        self._stacks.append(stack)
        self._end += -(-stack.size // ALIGN) * ALIGN
        return stack

    def allocate(self, ctx, seed):
        """Make both arrays. Tensor number i draws from (seed, i): the same weights on every device."""
        host = _aligned_zeros(self._end, ctx.dtype)
        for i, p in enumerate(self):
            view = host[self[p].start : self[p].start + self[p].size]
            if self[p].init == "one":
                view[:] = 1
            elif self[p].init != "zero":
                view[:] = (random_bits((1, view.size), seed, i, INIT)[0] / 2.0**31 - 1) * self[p].init
        self.ctx, self.data, self.grad = (
            ctx,
            ctx.to_device(host),
            ctx.to_device(_aligned_zeros(self._end, ctx.dtype)),
        )
        ctx.add_shadow(self.data)
        for p in (*self._named.values(), *self._stacks):
            p.data = self.data[p.start : p.start + p.size].reshape(p.shape)
            p.grad = self.grad[p.start : p.start + p.size].reshape(p.shape)

    def zero_grad(self):
        """grad = 0."""
        self.ctx.k.zero_grad(self.grad)

    @property
    def count(self):
        return sum(p.size for p in self._named.values())

    def __getitem__(self, name):
        return self._named[name]

    def __iter__(self):
        return iter(self._named)

    def __contains__(self, name):
        return name in self._named

    def __len__(self):
        return len(self._named)
