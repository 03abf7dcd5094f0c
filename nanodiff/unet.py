"""The UNet: a path down, a middle, a path up that is handed the skips; backward is forward read bottom-up."""

import contextlib
import dataclasses

import numpy as np

from nanodiff.context import Context, NanodiffError
from nanodiff.layers import (
    Attention,
    Conv2d,
    Downsample,
    Dropout,
    GroupNorm,
    Linear,
    TimeEmbedding,
    Upsample,
    divided,
    resample,
    resample_backward,
)  # fmt: skip
from nanodiff.params import Params

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "mish": "mish"}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of diffusers' UNet2DModel, so that its config.json is this dataclass.

    The defaults here describe a small model; a field that a config.json omits takes diffusers' default
    (`from_dict`).
    """

    sample_size: int | tuple | None = None
    in_channels: int = 1
    out_channels: int = 1
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple = (DOWN, DOWN, ATTN_DOWN)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple = (ATTN_UP, UP, UP)
    block_out_channels: tuple = (32, 64, 128)
    layers_per_block: int = 1
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"  # of AttnDownBlock2D
    upsample_type: str = "conv"  # of AttnUpBlock2D
    dropout: float = 0.0
    act_fn: str = "silu"  # of the ResBlocks; SiLU inside the time embedding and before conv_out
    attention_head_dim: int | None = 32  # None: one head of the full width
    norm_num_groups: int | None = 8
    attn_norm_num_groups: int | None = None  # in the middle; None: norm_num_groups, none with scale_shift
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle
    class_embed_type: str | None = None
    num_class_embeds: int | None = None  # ignored where class_embed_type is set
    num_train_timesteps: int | None = None

    def __post_init__(self):
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise NanodiffError(
                    f"UNetConfig.{name} = {value!r}: must be a list, one entry for each level"
                )
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        self._check()

    def _check(self):
        def need(ok, field, limit):
            if not ok:
                raise NanodiffError(f"UNetConfig.{field} = {getattr(self, field)!r}: {limit}")

        def whole(value, least=1):
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        for field in ("dropout", "norm_eps", "freq_shift", "mid_block_scale_factor"):
            need(isinstance(getattr(self, field), (int, float)), field, "must be a number")
        for field in ("flip_sin_to_cos", "add_attention", "center_input_sample"):
            need(isinstance(getattr(self, field), bool), field, "must be true or false")
        channels, groups = self.block_out_channels, self.norm_num_groups
        need(
            channels and all(map(whole, channels)),
            "block_out_channels",
            "must be one or more integers above 0",
        )
        for field in ("in_channels", "out_channels"):
            need(whole(getattr(self, field)), field, "must be an integer above 0")
        layers = whole(self.layers_per_block, 0 if len(set(channels)) == 1 else 1)
        need(layers, "layers_per_block",
             "must be an integer above 0, or 0 where all block_out_channels are equal")  # fmt: skip
        need(
            whole(groups),
            "norm_num_groups",
            "must be an integer above 0 that divides every block_out_channels",
        )
        bad = [c for c in channels if c % groups]
        need(not bad, "norm_num_groups", f"must divide every block_out_channels, and does not divide {bad}")
        need(self.attn_norm_num_groups is None or whole(self.attn_norm_num_groups), "attn_norm_num_groups",
             "must be an integer above 0, or None")  # fmt: skip
        n = len(channels)
        for field, known in (("down_block_types", (DOWN, ATTN_DOWN)), ("up_block_types", (UP, ATTN_UP))):
            need(
                len(getattr(self, field)) == n, field, f"must name {n} blocks, as many as block_out_channels"
            )
            need(all(b in known for b in getattr(self, field)), field, f"each block must be one of {known}")
        levels = zip(channels, self.down_block_types, reversed(self.up_block_types))
        widths = [c for c, *blocks in levels if ATTN_DOWN in blocks or ATTN_UP in blocks]
        if self.mid_block_type and self.add_attention:
            widths.append(channels[-1])
            divides = channels[-1] % (self.attn_norm_num_groups or groups) == 0
            need(divides, "attn_norm_num_groups", f"must divide {channels[-1]}")
        if widths and self.attention_head_dim is not None:
            fits = whole(self.attention_head_dim) and self.attention_head_dim <= min(widths)
            need(
                fits,
                "attention_head_dim",
                f"must be from 1 to {min(widths)}, the width it is used at, or None",
            )
        need(0 <= self.dropout < 1, "dropout", "must be in [0, 1)")
        need(self.norm_eps > 0, "norm_eps", "must be above 0")
        need(self.downsample_padding in (0, 1), "downsample_padding", "must be 0 or 1")
        need(self.num_class_embeds is None or whole(self.num_class_embeds), "num_class_embeds",
             "must be an integer above 0, or None")  # fmt: skip
        need(self.time_embedding_dim is None or whole(self.time_embedding_dim), "time_embedding_dim",
             "must be an integer above 0, or None for 4 * block_out_channels[0]")  # fmt: skip
        half = channels[0] // 2
        need(self.freq_shift != half or half == 0, "freq_shift",
             f"must not be {half}, half of block_out_channels[0]: it would divide by 0")  # fmt: skip
        need(self.mid_block_scale_factor != 0, "mid_block_scale_factor", "must not be 0")
        sizes = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        fits = self.sample_size is None or (
            len(sizes) == 2 and all(whole(s) and s % self.stride == 0 for s in sizes)
        )
        need(fits, "sample_size", f"must be an integer or two, divisible by {self.stride}")
        for field, values in _SUPPORTED.items():
            need(
                getattr(self, field) in values, field, f"this version has only {', '.join(map(repr, values))}"
            )

    @property
    def stride(self):
        """Height and width of an image must be divisible by this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, d):
        """From a diffusers config.json: unknown keys are ignored, missing ones take diffusers' defaults."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{**_DIFFUSERS, **{k: v for k, v in d.items() if k in names}})

    def to_dict(self):
        """All fields, as JSON knows them."""
        d = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()}


# what diffusers means by a field that a config.json omits, where it differs from the small model above
_DIFFUSERS = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2,
    "down_block_types": (DOWN, ATTN_DOWN, ATTN_DOWN, ATTN_DOWN),
    "up_block_types": (ATTN_UP, ATTN_UP, ATTN_UP, UP),
    "attention_head_dim": 8, "norm_num_groups": 32,
}  # fmt: skip
_SUPPORTED = {
    "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"), "upsample_type": ("conv", "resnet"),
    "act_fn": tuple(ACTIVATIONS), "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}  # fmt: skip


class ResBlock:
    """x -> norm, SiLU, conv1 (+ time) -> norm, SiLU, dropout, conv2 -> + shortcut(x).

    way      "up" or "down": x, and what conv1 gets, are resampled first
    divisor  of the output
    config   act_fn: an activation instead of SiLU; resnet_time_scale_shift = "scale_shift": time scales and
             shifts the output of the second norm, instead of being added before it
    """

    def __init__(self, net, name, C, O, D, way=None, divisor=1):
        cfg, self.k, self.way, self.divisor = net.config, net.ctx.k, way, divisor
        self.modulates = cfg.resnet_time_scale_shift == "scale_shift"
        norm = (cfg.norm_num_groups, cfg.norm_eps, ACTIVATIONS[cfg.act_fn])
        self.norm1 = GroupNorm(net, f"{name}.norm1", C, *norm)
        self.conv1 = Conv2d(net, f"{name}.conv1", C, O)
        self.time_emb_proj = Linear(net, f"{name}.time_emb_proj", D, 2 * O if self.modulates else O)
        self.norm2 = GroupNorm(net, f"{name}.norm2", O, *norm)
        self.dropout = Dropout(net, cfg.dropout)
        self.conv2 = Conv2d(net, f"{name}.conv2", O, O, zero=True)
        self.shortcut = Conv2d(net, f"{name}.conv_shortcut", C, O, K=1) if C != O else None

    def forward(self, x, emb):  # (B,H,W,C), (B,D) -> (B,H,W,O)
        h, x = self._input(self.norm1.forward(x)), self._input(x)
        added, modulating = self.time_emb_proj.forward(emb), None
        if self.modulates:
            added, modulating = None, added
        h = self.conv1.forward(h, added, again=lambda: self._input(self.norm1.again()))
        h = self.norm2.forward(h, modulating)
        h = self.dropout.forward(h)
        r = self.shortcut.forward(x) if self.shortcut else x
        out = self.conv2.forward(h, residual=r, again=None if self.dropout.rate else self.norm2.again)
        return divided(self.k, out, self.divisor)

    def _input(self, x):
        return resample(self.k, x, self.way)

    def backward(self, dout):  # -> dx, demb
        dout = divided(self.k, dout, self.divisor)
        dr = self.shortcut.backward(dout)[0] if self.shortcut else dout
        dh, _ = self.conv2.backward(dout)
        dh = self.dropout.backward(dh)
        dh, modulating = self.norm2.backward(dh)
        dh, added = self.conv1.backward(dh)
        demb = self.time_emb_proj.backward(modulating if self.modulates else added)
        dh, dr = (resample_backward(self.k, d, self.way) for d in (dh, dr))
        dx, _ = self.norm1.backward(dh, residual=dr)  # x fed the block and the shortcut
        return dx, demb


class UNet:
    """The network of DDPM (Ho et al. 2020), parameter for parameter diffusers' UNet2DModel.

    config  a UNetConfig
    device  "cpu", "gpu" (or "cuda"), or "ref": NumPy
    dtype   "float32"; also "bfloat16" on the GPU (its default), "float64" on "ref": see Context
    seed    of the initial weights, which are the same on every device
    init    "ddpm" (residual branches start at zero), "torch" (PyTorch's default), or None: names and shapes
            without memory, until params.allocate (checkpoint.py compares them with a file first)
    """

    def __init__(self, config, device="cpu", seed=0, dtype=None, init="ddpm"):
        if not isinstance(config, UNetConfig):
            raise NanodiffError(
                f"config is a {type(config).__name__}: must be a UNetConfig (UNetConfig.from_dict)"
            )
        if init not in ("ddpm", "torch", None):
            raise NanodiffError(f"init = {init!r}: must be 'ddpm', 'torch' or None")
        self.config, self.ctx, self.init = config, Context(device, dtype), init
        self.params, self.layers, self.key = Params(), [], None
        self._widths, self._shape = [], None  # of the last forward, for its backward
        self._build(config)
        if init is not None:
            self.params.allocate(self.ctx, seed)

    def _build(self, cfg):
        channels, last = cfg.block_out_channels, len(cfg.block_out_channels) - 1
        D = cfg.time_embedding_dim or 4 * channels[0]

        def attention(name, C, groups=cfg.norm_num_groups, divisor=1):
            return Attention(self, name, C, cfg.attention_head_dim or C, groups, cfg.norm_eps, divisor)

        self.conv_in = Conv2d(self, "conv_in", cfg.in_channels, channels[0])
        self.time = TimeEmbedding(
            self, channels[0], D, cfg.flip_sin_to_cos, cfg.freq_shift,
            cfg.class_embed_type or cfg.num_class_embeds, ACTIVATIONS[cfg.act_fn],
        )  # fmt: skip
        # a block is a list of (ResBlock, Attention or None) and a resampling layer or None
        self.down, self.up, C = [], [], channels[0]
        for b, (O, kind) in enumerate(zip(channels, cfg.down_block_types)):
            name, pairs = f"down_blocks.{b}", []
            for j in range(cfg.layers_per_block):
                resnet = ResBlock(self, f"{name}.resnets.{j}", C if j == 0 else O, O, D)
                pairs.append((resnet, attention(f"{name}.attentions.{j}", O) if kind == ATTN_DOWN else None))
            down, name = None, f"{name}.downsamplers.0"
            if b < last and kind == ATTN_DOWN and cfg.downsample_type == "resnet":
                down = ResBlock(self, name, O, O, D, way="down")
            elif b < last:
                down = Downsample(self, name, O, cfg.downsample_padding)
            self.down.append((pairs, down))
            C = O
        self.mid = []
        if cfg.mid_block_type:
            divisor, groups, attn = cfg.mid_block_scale_factor, cfg.attn_norm_num_groups, None
            if groups is None and cfg.resnet_time_scale_shift == "default":
                groups = cfg.norm_num_groups
            if cfg.add_attention:
                attn = attention("mid_block.attentions.0", C, groups, divisor)
            resnets = [ResBlock(self, f"mid_block.resnets.{j}", C, C, D, divisor=divisor) for j in range(2)]
            self.mid = [(resnets[0], attn), (resnets[1], None)]
        skips = [channels[0]]  # widths of what the path down leaves for the path up
        for b, O in enumerate(channels):
            skips += [O] * (cfg.layers_per_block + (b < last))
        for b, (O, kind) in enumerate(zip(reversed(channels), cfg.up_block_types)):
            name, pairs = f"up_blocks.{b}", []
            for j in range(cfg.layers_per_block + 1):
                resnet = ResBlock(self, f"{name}.resnets.{j}", C + skips.pop(), O, D)
                pairs.append((resnet, attention(f"{name}.attentions.{j}", O) if kind == ATTN_UP else None))
                C = O
            up, name = None, f"{name}.upsamplers.0"
            if b < last and kind == ATTN_UP and cfg.upsample_type == "resnet":
                up = ResBlock(self, name, O, O, D, way="up")
            elif b < last:
                up = Upsample(self, name, O)
            self.up.append((pairs, up))
        self.norm_out = GroupNorm(self, "conv_norm_out", C, cfg.norm_num_groups, cfg.norm_eps)
        self.conv_out = Conv2d(self, "conv_out", C, cfg.out_channels, zero=True)

    def forward(self, x, t, labels=None, key=None):
        """What the network says of x at time t, keeping what `backward` needs.

        x       (B, H, W, in_channels) float array of the device; H and W divisible by config.stride
        t       (B,) time steps
        labels  (B,) class numbers, where config.num_class_embeds is set; for the class_embed_type "timestep"
                (B,) numbers, for "identity" float embeddings (B, time_embedding_dim)
        key     (seed, step) of the noise of dropout, needed where config.dropout > 0
        returns (B, H, W, out_channels)
        """
        return self._saving_forward(*self._checked(x, t, labels), key)

    def _saving_forward(self, x, t, labels, key):
        if self.config.dropout and key is None:
            raise NanodiffError(
                f"dropout = {self.config.dropout} needs key=(seed, step) to draw its noise from"
            )
        for layer in self.layers:  # what a forward left that no backward followed
            layer._stack.clear()
        self.key, self.ctx.saving = key, True
        self._shape = None
        try:
            out = self._forward(x, t, labels)
        finally:
            self.ctx.saving = False
        self._shape = out.shape
        return out

    def loss_and_grad(self, x, t, target, labels=None, key=None, weight=None):
        """The loss of a training step, and its gradient in params.grad, which is cleared first: `forward`,
        mse_loss and `backward` in one. On the CPU further calls with the same shapes run as the first one was
        recorded (Context.replay), unless the network has dropout or is frozen.

        x, t, labels, key   as in `forward`
        target  (B, H, W, out_channels): what the network should say
        weight  (B,) numbers: of each sample's loss; None: 1
        returns the loss, float64 (1,)
        """
        x, t, labels = self._checked(x, t, labels)
        shapes = (*x.shape[:3], self.config.out_channels), x.shape[:1]
        for name, array, shape in zip(("target", "weight"), (target, weight), shapes):
            if np.shape(array) != shape and (array is not None or name == "target"):
                raise NanodiffError(f"{name} has shape {np.shape(array)}: must be {shape}")
        weight = None if weight is None else self.ctx.to_device(weight)
        arrays = x, t, labels, self.ctx.to_device(target), weight
        if self.config.dropout or self.ctx.frozen is not None:
            return self._loss_and_grad(*arrays, key)
        return self.ctx.replay("step", self._loss_and_grad, *arrays)

    def _loss_and_grad(self, x, t, labels, target, weight, key=None):
        loss, dout = self.ctx.k.mse_loss(self._saving_forward(x, t, labels, key), target, weight)
        self.params.zero_grad()
        self.backward(dout, wants_dx=False)
        return loss

    def predict(self, x, t, labels=None):
        """`forward` without dropout, keeping nothing. Sample b depends on x[b], t[b] and labels[b] alone."""
        arrays = self._checked(x, t, labels)
        if self.ctx.frozen is None:
            return self._forward(*arrays)
        return self.ctx.replay("predict", self._forward, *arrays)

    def _forward(self, x, t, labels):
        k = self.ctx.k
        self.ctx.prepare_weights(self.params.data)
        emb = self.time.forward(t, labels)
        if self.config.center_input_sample:
            x = k.affine(x, 2, -1)
        h = self.conv_in.forward(self.ctx.narrow(x))
        skips = [h]
        for pairs, down in self.down:
            for resnet, attn in pairs:
                h = resnet.forward(h, emb)
                h = attn.forward(h) if attn else h
                skips.append(h)
            if down:
                h = down.forward(h, emb)
                skips.append(h)
        for resnet, attn in self.mid:
            h = resnet.forward(h, emb)
            h = attn.forward(h) if attn else h
        self._widths = []  # channels of h at every joint, where backward parts them again
        for pairs, up in self.up:
            for resnet, attn in pairs:
                self._widths.append(h.shape[-1])
                h = k.concat(h, skips.pop())
                h = resnet.forward(h, emb)
                h = attn.forward(h) if attn else h
            h = up.forward(h, emb) if up else h
        assert not skips
        h = self.norm_out.forward(h)
        return self.ctx.widen(self.conv_out.forward(h, again=self.norm_out.again))

    def backward(self, dout, wants_dx=True):
        """The gradient of x (None unless wanted) from that of the last forward's output; adds into
        params.grad."""
        shape, self._shape = self._shape, None
        if shape is None:
            raise RuntimeError(
                "backward without a forward before it: call forward first, once for each backward"
            )
        if tuple(getattr(dout, "shape", ())) != shape:
            self._shape = shape
            raise NanodiffError(
                f"dout has shape {getattr(dout, 'shape', None)}: must be {shape}, as forward's output"
            )
        k = self.ctx.k
        widths, dskips, self.demb = list(self._widths), [], None
        dh, _ = self.conv_out.backward(self.ctx.narrow(self.ctx.to_device(dout)))
        dh, _ = self.norm_out.backward(dh)
        for pairs, up in reversed(self.up):
            dh = self._block_backward(up, dh) if up else dh
            for resnet, attn in reversed(pairs):
                dh = attn.backward(dh) if attn else dh
                dh = self._block_backward(resnet, dh)
                dh, dskip = k.split(dh, widths.pop())
                dskips.append(dskip)
        for resnet, attn in reversed(self.mid):
            dh = attn.backward(dh) if attn else dh
            dh = self._block_backward(resnet, dh)
        for pairs, down in reversed(self.down):
            if down:
                dh = k.add(dh, dskips.pop())  # h fed the next block and a skip
                dh = self._block_backward(down, dh)
            for resnet, attn in reversed(pairs):
                dh = k.add(dh, dskips.pop())  # likewise
                dh = attn.backward(dh) if attn else dh
                dh = self._block_backward(resnet, dh)
        dh = k.add(dh, dskips.pop())
        assert not dskips
        dx, _ = self.conv_in.backward(dh, wants_dx)
        if wants_dx and self.config.center_input_sample:
            dx = k.affine(dx, 2, 0)
        self.time.backward(self.demb)
        return self.ctx.widen(dx) if wants_dx else None

    def _block_backward(self, block, dout):
        dx, demb = block.backward(dout)
        if demb is not None:  # emb fed every ResBlock
            self.demb = demb if self.demb is None else self.ctx.k.add(self.demb, demb)
        return dx

    @contextlib.contextmanager
    def frozen(self):
        """Inside, the weights do not change: their prepared forms are made once and kept."""
        outer = self.ctx.frozen
        self.ctx.frozen = {} if outer is None else outer
        try:
            yield self
        finally:
            self.ctx.frozen = outer
            if outer is None:
                self.ctx.recordings.pop("predict", None)

    def _checked(self, x, t, labels):
        cfg, stride = self.config, self.config.stride
        shape = tuple(getattr(x, "shape", ()))
        if len(shape) != 4 or shape[3] != cfg.in_channels or 0 in shape:
            raise NanodiffError(f"x has shape {shape}: must be (B, H, W, {cfg.in_channels})")
        if shape[1] % stride or shape[2] % stride:
            near = [max(stride, round(n / stride) * stride) for n in shape[1:3]]
            raise NanodiffError(
                f"x is {shape[1]}x{shape[2]}: height and width must be divisible by {stride}; nearest: "
                f"{near[0]}x{near[1]}"
            )
        if x.dtype.kind != "f":
            raise NanodiffError(f"x has dtype {x.dtype}: must be a float array, images scaled to [-1, 1]")
        t = np.asarray(t)
        if t.shape != (shape[0],) or t.dtype.kind not in "iuf" or not (np.isfinite(t).all() and t.min() >= 0):
            raise NanodiffError(
                f"t has shape {t.shape}, dtype {t.dtype}: must be {shape[0]} numbers, none below 0"
            )
        return self.ctx.to_device(x), *self.ctx.numbers(t, self._checked_labels(labels, shape[0]))

    def _checked_labels(self, labels, B):
        kind, classes = self.config.class_embed_type, self.config.num_class_embeds
        if (labels is None) != (kind is None and classes is None):
            want = "None (the network has no classes)" if labels is not None else "given, one for each image"
            raise NanodiffError(
                f"labels: must be {want}; num_class_embeds = {classes}, class_embed_type = {kind!r}"
            )
        if labels is None:
            return None
        labels = np.asarray(labels)
        shape = (B, self.time.linear_2.weight.shape[1]) if kind == "identity" else (B,)
        ok = labels.shape == shape and labels.dtype.kind in ("iuf" if kind else "iu")
        if kind and not (ok and np.isfinite(labels).all()):
            raise NanodiffError(f"labels of shape {labels.shape}: must be finite numbers of shape {shape}")
        if not kind and not (ok and labels.min() >= 0 and labels.max() < classes):
            raise NanodiffError(f"labels: must be {B} integers from 0 to {classes - 1}")
        return self.ctx.to_device(labels) if kind == "identity" else labels

    def save_pretrained(self, folder, diffusion=None):
        """Write config.json and the weights in diffusers' layout; with a Diffusion, a whole DDPMPipeline."""
        from nanodiff import checkpoint

        checkpoint.save_pretrained(self, folder, diffusion)

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read a folder in diffusers' layout: a model's, or a pipeline's with unet/ in it."""
        from nanodiff import checkpoint

        return checkpoint.from_pretrained(folder, device)
