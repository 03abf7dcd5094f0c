"""Layers: an op of the kernels, its weights, and what its backward needs.

While training, a layer's forward puts on its own stack what its backward takes off again. A backward adds
into the gradients of the weights and returns the gradient of the input.
"""

import math


class Layer:
    """`net` is what the layers of one network share: .ctx, .params, .layers and .init ("ddpm" or "torch")."""

    def __init__(self, net):
        self.net, self.ctx, self.k = net, net.ctx, net.ctx.k
        self._stack = []
        net.layers.append(self)

    def save(self, *arrays):
        if self.ctx.saving:
            self._stack.append(arrays)

    def saved(self):
        """What the last forward saved. Taken off the stack, so that its memory is free after the backward."""
        if not self._stack:
            raise RuntimeError(
                f"backward of {type(self).__name__} without a forward before it: call forward first"
            )
        return self._stack.pop()

    def weights(self, name, shape, fan_in, fan_out, zero, parts=()):
        """A weight and its bias, initialised as the network asks; or a stack of them, with names of its
        parts.

        "ddpm": uniform with variance 2 / (fan_in + fan_out), bias 0; layers that end a residual branch start
        at 0, so that every block starts as the identity (Ho et al. 2020). "torch": uniform +-1 / sqrt(fan_in)
        for both.
        """
        torch = 1 / math.sqrt(fan_in)
        ddpm = "zero" if zero else math.sqrt(6 / (fan_in + fan_out))
        pick = (torch, torch) if self.net.init == "torch" else (ddpm, "zero")

        def add(what, *args):
            params, names = self.net.params, [f"{name}.{part}.{what}" for part in parts]
            return params.stack(names, *args) if parts else params.add(f"{name}.{what}", *args)

        return add("weight", shape, pick[0]), add("bias", shape[-1:], pick[1])


class Linear(Layer):
    """`parts`: the names of S layers of the same input that are made at once, so that it is read once."""

    def __init__(self, net, name, C, O, zero=False, parts=()):
        super().__init__(net)
        self.weight, self.bias = self.weights(name, (C, O), C, O, zero, parts)

    def forward(self, x, residual=None):  # (..., C) -> (..., O), or (S, ..., O)
        self.save(x)
        return self.k.linear_forward(x, self.weight.data, self.bias.data, residual)

    def backward(self, dout):
        (x,) = self.saved()
        return self.k.linear_backward(dout, x, self.weight.data, self.weight.grad, self.bias.grad)


class Conv2d(Layer):
    """Kernel K x K; `pad` = zeros (before, after) along both axes, by default those that keep the size."""

    def __init__(self, net, name, C, O, K=3, stride=1, pad=None, zero=False):
        super().__init__(net)
        self.stride, self.pad = stride, pad or (K // 2, K // 2)
        self.weight, self.bias = self.weights(name, (K, K, C, O), K * K * C, K * K * O, zero)

    def forward(self, x, emb=None, residual=None, again=None):  # (B,H,W,C), (B,O), (B,Ho,Wo,O) -> (B,Ho,Wo,O)
        """again: a function that makes x again when the backward needs it, so that x need not be kept."""
        self.save(again or x)
        weight = self._prepared(self.k.conv_prepare, *x.shape[1:3], self.stride, self.pad)
        return self.k.conv_forward(x, weight, self.bias.data, self.stride, self.pad, emb, residual)

    def _prepared(self, prepare, *shape):
        kept = self.ctx.frozen  # a dictionary while the weights do not change, else None
        if kept is None:
            return prepare(self.weight.data, *shape)
        if (self, *shape) not in kept:
            kept[self, *shape] = self.ctx.lasting(prepare, self.weight.data, *shape)
        return kept[self, *shape]

    def backward(self, dout, wants_dx=True):  # -> dx or None, demb
        (x,) = self.saved()
        x = x() if callable(x) else x
        weight, grads = self.weight.data, (self.weight.grad, self.bias.grad)
        return self.k.conv_backward(dout, x, weight, self.stride, self.pad, *grads, wants_dx)


class GroupNorm(Layer):
    """Group norm, then y (1 + scale) + shift where it is handed emb = [scale | shift], then the activation
    `act` (or None). SiLU right behind the norm is in the same pass (GroupNormSiLU).
    """

    def __init__(self, net, name, C, groups, eps, act="silu"):
        super().__init__(net)
        self.groups, self.eps, self.act = groups, eps, act
        self.weight = net.params.add(f"{name}.weight", (C,), "one")
        self.bias = net.params.add(f"{name}.bias", (C,), "zero")

    def _fused(self, emb):
        return self.act == "silu" and emb is None

    def _behind(self, y, emb):
        if emb is not None:
            return self.k.modulate_forward(y, emb, self.act)
        return y if self.act in (None, "silu") else self.k.activation_forward(y, self.act)

    def forward(self, x, emb=None):  # (B,H,W,C), (B,2C) -> (B,H,W,C)
        y, mean, rstd = self.k.groupnorm_forward(
            x, self.weight.data, self.bias.data, self.groups, self.eps, self._fused(emb)
        )
        self.save(x, mean, rstd, emb)
        return self._behind(y, emb)

    def again(self):
        """The output of the last forward once more: half of its work, and no memory until the backward."""
        x, mean, rstd, emb = self._stack[-1]
        weight, bias = self.weight.data, self.bias.data
        y = self.k.groupnorm_again(x, mean, rstd, weight, bias, self.groups, self._fused(emb))
        return self._behind(y, emb)

    def backward(
        self, dout, residual=None
    ):  # residual: a gradient that reached x by another way; -> dx, demb
        x, mean, rstd, emb = self.saved()
        weight, bias, demb = self.weight.data, self.bias.data, None
        if emb is not None or self.act not in (None, "silu"):
            y = self.k.groupnorm_again(x, mean, rstd, weight, bias, self.groups, False)
            if emb is None:
                dout = self.k.activation_backward(dout, y, self.act)
            else:
                dout, demb = self.k.modulate_backward(dout, y, emb, self.act)
        dx = self.k.groupnorm_backward(
            dout, x, mean, rstd, weight, bias, self.groups, self._fused(emb),
            self.weight.grad, self.bias.grad, residual,
        )  # fmt: skip
        return dx, demb


def divided(k, x, divisor):
    """x / divisor; its backward is the same."""
    return x if divisor == 1 else k.affine(x, 1 / divisor, 0)


class Attention(Layer):
    """(x + to_out(attention(to_q(h), to_k(h), to_v(h)))) / divisor with h = group norm of x, or x without
    `groups`. As many heads of width `head` as C has room for."""

    def __init__(self, net, name, C, head, groups, eps, divisor=1):
        super().__init__(net)
        self.heads, self.divisor, D = C // head, divisor, C // head * head
        self.norm = GroupNorm(net, f"{name}.group_norm", C, groups, eps, act=None) if groups else None
        self.to_qkv = Linear(net, name, C, D, parts=("to_q", "to_k", "to_v"))
        self.to_out = Linear(net, f"{name}.to_out.0", D, C, zero=True)

    def forward(self, x):  # (B,H,W,C) -> (B,H,W,C)
        B, H, W, C = x.shape
        h = (self.norm.forward(x) if self.norm else x).reshape(B, H * W, C)
        q, k, v = self.to_qkv.forward(h)
        out, lse = self.k.attention_forward(q, k, v, self.heads)
        self.save(q, k, v, out, lse)
        out = self.to_out.forward(out, residual=x.reshape(h.shape)).reshape(x.shape)
        return divided(self.k, out, self.divisor)

    def backward(self, dout):
        B, H, W, C = dout.shape
        dout = divided(self.k, dout, self.divisor)
        q, k, v, out, lse = self.saved()
        dh = self.to_out.backward(dout.reshape(B, H * W, C))
        dqkv = self.k.attention_backward(dh, q, k, v, out, lse, self.heads)
        dh = self.to_qkv.backward(dqkv).reshape(dout.shape)
        # x fed the block and the residual
        return self.norm.backward(dh, residual=dout)[0] if self.norm else self.k.add(dh, dout)


def resample(k, x, way):
    """Twice the size (nearest neighbour; way "up"), half the size (means of 2x2; "down"), or x (None)."""
    if way == "up":
        return k.upsample_forward(x)
    return k.affine(k.upsample_backward(x), 0.25, 0) if way == "down" else x


def resample_backward(k, dout, way):
    if way == "up":
        return k.upsample_backward(dout)
    return k.affine(k.upsample_forward(dout), 0.25, 0) if way == "down" else dout


class Upsample(Conv2d):
    """Nearest neighbour x 2, then a 3x3 convolution. (Called like a ResBlock, which can take its place.)"""

    def __init__(self, net, name, C):
        super().__init__(net, f"{name}.conv", C, C)

    def forward(self, x, emb=None):  # (B,H,W,C) -> (B,2H,2W,C)
        self.save(x)
        weight = self._prepared(self.k.upconv_prepare, *x.shape[1:3])
        return self.k.upconv_forward(x, weight, self.bias.data)

    def backward(self, dout):  # -> dx, no demb
        (x,) = self.saved()
        grads = self.weight.grad, self.bias.grad
        return self.k.upconv_backward(dout, x, self.weight.data, *grads), None


class Downsample(Layer):
    """A 3x3 convolution of stride 2. `padding` 1: a border of zeros; 0: zeros on the right and below only
    (DDPM)."""

    def __init__(self, net, name, C, padding):
        super().__init__(net)
        self.conv = Conv2d(net, f"{name}.conv", C, C, stride=2, pad=(padding, padding) if padding else (0, 1))

    def forward(self, x, emb=None):  # (B,H,W,C) -> (B,H/2,W/2,C)
        return self.conv.forward(x)

    def backward(self, dout):  # -> dx, no demb
        return self.conv.backward(dout)[0], None


class Dropout(Layer):
    """Drops elements with probability `rate` while training; nothing in `predict`."""

    def __init__(self, net, rate):
        super().__init__(net)
        self.rate, self.site = rate, len(net.layers)

    def forward(self, x):
        if not (self.rate and self.ctx.saving):
            return x
        self.save(self.net.key)
        return self.k.dropout(x, self.rate, *self.net.key, self.site)

    def backward(self, dout):
        if not self.rate:
            return dout
        return self.k.dropout(dout, self.rate, *self.saved()[0], self.site)


class Waves(Layer):
    """linear_2(silu(linear_1(sinusoids of t)))."""

    def __init__(self, net, name, dim, D, flip_sin_to_cos, freq_shift):
        super().__init__(net)
        self.sinusoids = (dim, flip_sin_to_cos, freq_shift)
        self.linear_1 = Linear(net, f"{name}.linear_1", dim, D)
        self.linear_2 = Linear(net, f"{name}.linear_2", D, D)

    def forward(self, t):  # (B,) -> (B,D)
        hidden = self.linear_1.forward(self.k.time_embedding(t, *self.sinusoids, self.ctx.dtype))
        self.save(hidden)
        return self.linear_2.forward(self.k.activation_forward(hidden, "silu"))

    def backward(self, dout):  # t has no gradient
        (hidden,) = self.saved()
        self.linear_1.backward(self.k.activation_backward(self.linear_2.backward(dout), hidden, "silu"))


class TimeEmbedding(Waves):
    """act(waves of t + class embedding): as every block uses it.

    classes: None; the rows of a table, where labels are row numbers; "timestep", where they are numbers with
    waves of their own; or "identity", where they are embeddings, (B,D).
    """

    def __init__(self, net, dim, D, flip_sin_to_cos, freq_shift, classes=None, act="silu"):
        super().__init__(net, "time_embedding", dim, D, flip_sin_to_cos, freq_shift)
        self.classes, self.act, name = classes, act, "class_embedding"
        if classes == "timestep":
            self.waves = Waves(net, name, dim, D, flip_sin_to_cos, freq_shift)
        elif classes and classes != "identity":
            # a normal of deviation 1 in other programs; a uniform of the same variance here
            self.table = net.params.add(f"{name}.weight", (classes, D), math.sqrt(3))

    def forward(self, t, labels):  # (B,), (B,) or (B,D) or None -> (B,D)
        emb = super().forward(t)
        if self.classes == "timestep":
            emb = self.k.add(emb, self.waves.forward(labels))
        elif self.classes:
            same = self.classes == "identity"
            emb = self.k.add(emb, labels if same else self.k.embedding_forward(labels, self.table.data))
        self.save(emb, labels)
        return self.k.activation_forward(emb, self.act)

    def backward(self, dout):
        emb, labels = self.saved()
        demb = self.k.activation_backward(dout, emb, self.act)
        if self.classes == "timestep":
            self.waves.backward(demb)
        elif self.classes and self.classes != "identity":
            self.k.embedding_backward(demb, labels, self.table.grad)
        super().backward(demb)
