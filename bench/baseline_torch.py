"""The opponent: diffusers' UNet2DModel in plain PyTorch, written to be fast and fair.

Same fields, parameter names and numbers as diffusers (a test holds it to that), so weights interchange.
Residual sums are in place, attention needs no copy in channels_last, the time embedding's SiLU is taken once,
and nothing wraps the calls. Float32, on "cpu" and "cuda"; `build` picks memory format and compilation.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

DEFAULTS = dict(  # diffusers' defaults for the fields that this network obeys
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(224, 448, 672, 896),
    layers_per_block=2,
    downsample_padding=1,
    dropout=0.0,
    attention_head_dim=8,
    norm_num_groups=32,
    norm_eps=1e-5,
    add_attention=True,
    num_class_embeds=None,
)


class ResBlock(nn.Module):
    def __init__(self, cin, cout, temb, groups, eps, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None
        self.dropout = dropout

    def forward(self, x, temb):  # (B,cin,H,W), (B,D) -> (B,cout,H,W)
        h = self.conv1(F.silu(self.norm1(x)))
        h += self.time_emb_proj(temb)[:, :, None, None]
        h = F.silu(self.norm2(h))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        h = self.conv2(h)
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h


class Attention(nn.Module):
    def __init__(self, channels, head_dim, groups, eps):
        super().__init__()
        self.heads = channels // (head_dim or channels)
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):  # (B,C,H,W)
        B, C, H, W = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # no copy in channels_last
        q, k, v = (
            f(h).view(B, H * W, self.heads, -1).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        return self.to_out[0](h).view(B, H, W, C).permute(0, 3, 1, 2) + x


class Resample(nn.Module):
    """3x3 convolution after nearest upsampling, or with stride 2 (padding 0: right and bottom edge only)."""

    def __init__(self, channels, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x):
        if self.conv.stride[0] == 1:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.conv.padding[0] == 0:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Block(nn.Module):
    """Residual blocks of given (in, out) widths, each followed by attention where there is any."""

    def __init__(self, widths, make_resnet, make_attention):
        super().__init__()
        self.resnets = nn.ModuleList(make_resnet(i, o) for i, o in widths)
        if make_attention:
            self.attentions = nn.ModuleList(make_attention(o) for _, o in widths)
        self.attend = bool(make_attention)

    def layer(self, j, x, temb):
        x = self.resnets[j](x, temb)
        return self.attentions[j](x) if self.attend else x


class UNet(nn.Module):
    """UNet2DModel with positional time embedding and convolutional resampling; other kinds are refused.

    forward(x (B,C,H,W), t (B,) ints, labels (B,) ints or None) -> (B,out_channels,H,W)
    """

    def __init__(self, config):
        super().__init__()
        fixed = dict(
            time_embedding_type="positional", downsample_type="conv", upsample_type="conv", act_fn="silu"
        )
        fixed |= dict(
            resnet_time_scale_shift="default", mid_block_type="UNetMidBlock2D", class_embed_type=None
        )
        fixed |= dict(mid_block_scale_factor=1, attn_norm_num_groups=None)
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise ValueError(f"{name} = {config[name]!r}: the baseline only knows {value!r}")
        c = self.config = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        ch, layers, groups, eps = (
            c[k] for k in ("block_out_channels", "layers_per_block", "norm_num_groups", "norm_eps")
        )
        D = c["time_embedding_dim"] or 4 * ch[0]

        def resnet(i, o):
            return ResBlock(i, o, D, groups, eps, c["dropout"])

        def attention(channels):
            return Attention(channels, c["attention_head_dim"], groups, eps)

        self.conv_in = nn.Conv2d(c["in_channels"], ch[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(ch[0], D), "linear_2": nn.Linear(D, D)})
        self.class_embedding = nn.Embedding(c["num_class_embeds"], D) if c["num_class_embeds"] else None

        self.down_blocks = nn.ModuleList()
        skips, width = [ch[0]], ch[0]
        for b, kind in enumerate(c["down_block_types"]):
            widths = [(width if j == 0 else ch[b], ch[b]) for j in range(layers)]
            block = Block(widths, resnet, attention if kind.startswith("Attn") else None)
            skips += [ch[b]] * layers
            width = ch[b]
            if b < len(ch) - 1:
                block.downsamplers = nn.ModuleList([Resample(width, 2, c["downsample_padding"])])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = Block([(width, width)] * 2, resnet, None)
        self.mid_block.attentions = nn.ModuleList([attention(width)] if c["add_attention"] else [])

        self.up_blocks = nn.ModuleList()
        for b, kind in enumerate(c["up_block_types"]):
            out = ch[-1 - b]
            widths = [((width if j == 0 else out) + skips.pop(), out) for j in range(layers + 1)]
            block = Block(widths, resnet, attention if kind.startswith("Attn") else None)
            width = out
            if b < len(ch) - 1:
                block.upsamplers = nn.ModuleList([Resample(width, 1, 1)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, ch[0], eps)
        self.conv_out = nn.Conv2d(ch[0], c["out_channels"], 3, padding=1)

        half = ch[0] // 2
        steps = torch.arange(half, dtype=torch.get_default_dtype()) / (half - c["freq_shift"])
        self.register_buffer("frequencies", torch.exp(-math.log(10000.0) * steps), persistent=False)

    def time(self, t, labels):  # (B,) -> (B,D)
        angle = t[:, None].to(self.frequencies.dtype) * self.frequencies
        pair = (angle.cos(), angle.sin()) if self.config["flip_sin_to_cos"] else (angle.sin(), angle.cos())
        temb = F.pad(torch.cat(pair, 1), (0, self.config["block_out_channels"][0] % 2))
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))
        return temb if labels is None else temb + self.class_embedding(labels)

    def forward(self, x, t, labels=None):
        temb = F.silu(self.time(t, labels))  # every user of the embedding wants it after SiLU
        if self.config["center_input_sample"]:
            x = 2 * x - 1
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, h, temb)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block.resnets[0](h, temb)
        for attention in self.mid_block.attentions:
            h = attention(h)
        h = self.mid_block.resnets[1](h, temb)
        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                h = block.layer(j, torch.cat((h, skips.pop()), 1), temb)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def build(config, device="cpu", channels_last=False, compiled=False, seed=0):
    """A UNet ready to be timed, and a function `place` that puts images (B,C,H,W) where it wants them."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = UNet(config).to(device=device, memory_format=layout)
    if compiled:
        model.compile()  # keeps the parameter names, unlike torch.compile(model)
    return model, lambda x: x.to(device=device, memory_format=layout)
