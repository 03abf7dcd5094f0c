"""Adam over the flat buffers, with gradient clipping and an average of the weights; learning-rate
schedules."""

import contextlib
import math

import numpy as np

from nanodiff.context import NanodiffError


class Adam:
    """Adam (Kingma & Ba 2015), with clipping and an exponential moving average (EMA) of the weights.

    params  a network's Params
    lr      step size;  betas, eps as in the paper
    clip    largest global gradient norm, None for no clipping
    ema     largest decay of the average, None for no average; after n steps at most (1 + n) / (10 + n)

    m, v, ema: flat arrays like params.data; state: float64 [loss, squared gradient norm, taken, skipped].
    """

    def __init__(self, params, lr=2e-4, betas=(0.9, 0.999), eps=1e-8, clip=None, ema=None):
        if not (isinstance(lr, (int, float)) and 0 < lr < math.inf):
            raise NanodiffError(f"lr = {lr!r}: must be a number above 0, such as 2e-4")
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise NanodiffError(f"betas = {betas!r}: must be two numbers in [0, 1), such as (0.9, 0.999)")
        if not eps > 0:
            raise NanodiffError(f"eps = {eps!r}: must be above 0, such as 1e-8")
        if clip is not None and not clip > 0:
            raise NanodiffError(f"clip = {clip!r}: must be above 0, or None for no clipping")
        if ema is not None and not 0 <= ema < 1:
            raise NanodiffError(
                f"ema = {ema!r}: must be a decay in [0, 1), such as 0.999, or None for no average"
            )
        self.params, self.ctx = params, params.ctx
        self.lr, self.betas, self.eps, self.clip, self.ema_decay = lr, betas, eps, clip, ema
        self.m, self.v = (self.ctx.to_device(np.zeros(params.data.shape)) for _ in range(2))
        self.ema = None if ema is None else self.ctx.clone(params.data)
        self._no_ema = params.data[:0]
        self.state = self.ctx.to_device(np.zeros(4), np.float64)
        self._no_loss = self.ctx.to_device(np.zeros(1), np.float64)

    def step(self, loss=None, lr=None):
        """One update with the gradients in params.grad, which stay as they are.

        loss: an array of one float64, as mse_loss returns it. Where it or the gradient norm is not finite,
        the update does nothing but add one to the steps skipped (state[3]).
        lr: of this step; on the GPU also an array of one float64.
        """
        self.ctx.copy(self.state[0:1], self._no_loss if loss is None else loss)
        self.ctx.copy(self.state[1:2], self.ctx.k.squared_norm(self.params.grad))
        ema = self._no_ema if self.ema is None else self.ema
        self.ctx.k.adam_update(
            self.params.data, self.params.grad, self.m, self.v, ema, self.state,
            self.lr if lr is None else lr, *self.betas, self.eps, self.clip or 0.0, self.ema_decay or 0.0,
        )  # fmt: skip

    @contextlib.contextmanager
    def with_ema(self):
        """params.data holds the averaged weights inside; the raw ones come back at the end."""
        if self.ema is None:
            raise NanodiffError("this optimiser keeps no average: make it with Adam(..., ema=0.999)")
        raw = self.ctx.clone(self.params.data)
        self.ctx.copy(self.params.data, self.ema)
        try:
            yield
        finally:
            self.ctx.copy(self.params.data, raw)


def learning_rate(step, total, peak, warmup=0, decay="constant"):
    """Learning rate of `step` (0-based) out of `total`: linear from peak / warmup up to peak over `warmup`
    steps, then constant, or a half cosine down to 0 at `total` (Loshchilov & Hutter 2017, arXiv:1608.03983,
    eq. 5)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if decay == "constant":
        return peak
    if decay != "cosine":
        raise NanodiffError(f"decay = {decay!r}: must be 'constant' or 'cosine'")
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
