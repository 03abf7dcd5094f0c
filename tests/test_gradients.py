"""Every backward against central differences of its forward, in float64: ops, layers, blocks, networks."""

from types import SimpleNamespace

import numpy as np
import pytest

from nanodiff import layers
from nanodiff.context import Context
from nanodiff.kernels import load
from nanodiff.params import Params
from nanodiff.testing import CASES, check_gradient
from nanodiff.unet import ResBlock, UNet, UNetConfig

K = load("ref")


def arrays(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def added(backward, *params):
    """Runs backward(*gradients of params), which adds to what is there: its result, and what was added."""
    start = [np.random.default_rng(7).standard_normal(p.shape) for p in params]
    grads = [s.copy() for s in start]
    result = backward(*grads)
    return result, *(g - s for g, s in zip(grads, start))


# ---- ops: the whole Jacobian for every input and every parameter ----
@pytest.mark.parametrize("shape, C, O", [((1,), 1, 1), ((4,), 3, 5), ((2, 3), 4, 2)])
@pytest.mark.parametrize("residual, stack", [(False, ()), (True, ()), (False, (3,))])
def test_linear(shape, C, O, residual, stack):
    v = arrays(0, x=(*shape, C), weight=(*stack, C, O), bias=(*stack, O), residual=(*shape, O))

    def gradients(dout):
        dx, dw, db = added(
            lambda dw, db: K.linear_backward(dout, v["x"], v["weight"], dw, db), v["weight"], v["bias"]
        )
        return dict(x=dx, weight=dw, bias=db, residual=dout)

    def forward():
        return K.linear_forward(v["x"], v["weight"], v["bias"], v["residual"] if residual else None)

    if not residual:
        inputs = {name: v[name] for name in ("x", "weight", "bias")}
    check_gradient(forward, gradients, v if residual else inputs)


@pytest.mark.parametrize(
    "B, H, W, C, O, K_, stride, pad",
    [
        (1, 1, 1, 2, 3, 3, 1, (1, 1)),
        (2, 3, 4, 2, 2, 3, 1, (1, 1)),
        (2, 4, 6, 1, 2, 3, 2, (1, 1)),
        (1, 5, 3, 2, 2, 3, 2, (1, 1)),
        (2, 4, 4, 2, 1, 3, 2, (0, 1)),
        (1, 3, 5, 2, 2, 3, 2, (0, 1)),
        (2, 2, 3, 3, 2, 1, 1, (0, 0)),
        (1, 5, 4, 1, 2, 1, 2, (0, 0)),
        (1, 4, 5, 2, 1, 2, 2, (0, 0)),
        (1, 5, 4, 1, 2, 4, 3, (2, 1)),
        (1, 4, 3, 2, 1, 5, 1, (2, 2)),
    ],
)
def test_conv(B, H, W, C, O, K_, stride, pad):
    Ho, Wo = ((n + sum(pad) - K_) // stride + 1 for n in (H, W))
    v = arrays(1, x=(B, H, W, C), weight=(K_, K_, C, O), bias=O, emb=(B, O), residual=(B, Ho, Wo, O))

    def forward():
        weight = K.conv_prepare(v["weight"], H, W, stride, pad)
        return K.conv_forward(v["x"], weight, v["bias"], stride, pad, v["emb"], v["residual"])

    def gradients(dout):
        (dx, demb), dw, db = added(
            lambda dw, db: K.conv_backward(dout, v["x"], v["weight"], stride, pad, dw, db),
            v["weight"],
            v["bias"],
        )
        return dict(x=dx, weight=dw, bias=db, emb=demb, residual=dout)

    check_gradient(forward, gradients, v)


@pytest.mark.parametrize(
    "B, H, W, C, G", [(2, 2, 3, 4, 2), (1, 1, 1, 6, 1), (1, 3, 3, 4, 4), (2, 3, 1, 6, 3)]
)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_groupnorm(B, H, W, C, G, silu, residual):
    v = arrays(2, x=(B, H, W, C), weight=C, bias=C)
    v["x"] += 3

    def forward():
        out = K.groupnorm_forward(v["x"], v["weight"], v["bias"], G, 1e-5, silu)[0]
        return out + 0 if not residual else np.stack([out, v["x"]])  # x went another way too

    def gradients(dout):
        dout, more = dout if residual else (dout, None)
        _, mean, rstd = K.groupnorm_forward(v["x"], v["weight"], v["bias"], G, 1e-5, silu)

        def backward(dw, db):
            return K.groupnorm_backward(
                dout, v["x"], mean, rstd, v["weight"], v["bias"], G, silu, dw, db, more
            )

        dx, dw, db = added(backward, v["weight"], v["bias"])
        return dict(x=dx, weight=dw, bias=db)

    check_gradient(forward, gradients, v)


@pytest.mark.parametrize("B, N, C, heads", [(2, 3, 4, 2), (1, 1, 3, 1), (1, 6, 5, 1), (2, 4, 6, 3)])
def test_attention(B, N, C, heads):
    v = arrays(3, q=(B, N, C), k=(B, N, C), v=(B, N, C))

    def gradients(dout):
        made = K.attention_forward(*v.values(), heads)
        return dict(zip("qkv", K.attention_backward(dout, *v.values(), *made, heads)))

    check_gradient(lambda: K.attention_forward(*v.values(), heads)[0], gradients, v)


def test_upsample_add_and_affine():
    v = arrays(4, x=(2, 2, 3, 2), b=(2, 2, 3, 2))
    check_gradient(
        lambda: K.upsample_forward(v["x"]), lambda dout: dict(x=K.upsample_backward(dout)), dict(x=v["x"])
    )
    check_gradient(lambda: K.affine(v["x"], 2, -1), lambda dout: dict(x=K.affine(dout, 2, 0)), dict(x=v["x"]))
    check_gradient(lambda: K.add(v["x"], v["b"]), lambda dout: dict(x=dout, b=dout), v)


KINDS = ("silu", "relu", "gelu", "mish")


@pytest.mark.parametrize("kind", KINDS)
def test_activation(kind):
    v = arrays(9, x=(2, 2, 3, 2))
    v["x"].flat[:4] = 0.01, -8, 8, 30  # far out too
    check_gradient(
        lambda: K.activation_forward(v["x"], kind),
        lambda dout: dict(x=K.activation_backward(dout, v["x"], kind)),
        v,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_modulate(kind):
    v = arrays(10, x=(2, 2, 3, 4), emb=(2, 8))

    def gradients(dout):
        return dict(zip(v, K.modulate_backward(dout, **v, kind=kind)))

    check_gradient(lambda: K.modulate_forward(**v, kind=kind), gradients, v)


def test_concat_and_split_are_each_others_backward():
    v = arrays(5, a=(2, 1, 3, 2), b=(2, 1, 3, 3))
    check_gradient(lambda: K.concat(v["a"], v["b"]), lambda dout: dict(zip("ab", K.split(dout, 2))), v)
    x = arrays(5, x=(2, 1, 3, 5))

    def parts():
        return np.concatenate([p.ravel() for p in K.split(x["x"], 2)])

    def joined(dout):
        return dict(x=K.concat(dout[:12].reshape(2, 1, 3, 2), dout[12:].reshape(2, 1, 3, 3)))

    check_gradient(parts, joined, x)


def test_embedding():
    v, labels = arrays(6, table=(4, 3)), np.array([2, 0, 2, 3, 2])

    def gradients(dout):
        return dict(table=added(lambda dtable: K.embedding_backward(dout, labels, dtable), v["table"])[1])

    check_gradient(lambda: K.embedding_forward(labels, v["table"]), gradients, v)


def test_dropout_is_its_own_backward():
    v, key = arrays(7, x=(2, 3, 4, 2)), (0.4, 11, 3, 5)
    check_gradient(lambda: K.dropout(v["x"], *key), lambda dout: dict(x=K.dropout(dout, *key)), v)


def test_mse_loss():
    v = arrays(8, pred=(2, 3, 4, 1), target=(2, 3, 4, 1))

    def gradients(dout):
        dpred = K.mse_loss(**v)[1] * dout
        return dict(pred=dpred, target=-dpred)

    check_gradient(lambda: K.mse_loss(**v)[0], gradients, v)


@pytest.mark.parametrize("B, H, W, C, O", [(1, 1, 1, 1, 1), (1, 2, 3, 2, 3), (2, 3, 2, 3, 1)])
def test_upconv(B, H, W, C, O):
    v = arrays(0, x=(B, H, W, C), weight=(3, 3, C, O), bias=O)

    def gradients(dout):
        dx, dw, db = added(
            lambda dw, db: K.upconv_backward(dout, v["x"], v["weight"], dw, db), v["weight"], v["bias"]
        )
        return dict(x=dx, weight=dw, bias=db)

    check_gradient(lambda: K.upconv_forward(v["x"], v["weight"], v["bias"]), gradients, v)


def test_every_backward_is_checked_here():
    """A new op needs a line above (or, like the draws and the updates, has no gradient)."""
    checked = {"linear", "conv", "upconv", "groupnorm", "attention", "upsample", "activation", "modulate"}
    checked |= {"embedding"}
    assert {op.removesuffix("_backward") for op in CASES if op.endswith("_backward")} == checked


def test_a_wrong_gradient_is_found():
    """check_gradient itself, where it looks at the whole Jacobian and where it looks along directions."""
    for n, error in ((5, 1e-4), (300, 1e-2)):
        x = np.random.default_rng(0).standard_normal(n)

        def gradients(dout, x=x, error=error):
            g = 2 * x * dout
            g[3] += error * dout[3]
            return dict(x=g)

        with pytest.raises(AssertionError, match="x"):
            check_gradient(lambda x=x: x * x, gradients, dict(x=x))


# ---- layers ----
def network(**config):
    """What the layers of a network share, in float64 on the definition."""
    cfg = dict(
        norm_num_groups=2, norm_eps=1e-5, dropout=0.0, act_fn="silu", resnet_time_scale_shift="default"
    )
    cfg = SimpleNamespace(**cfg | config)
    ctx = Context("ref", np.float64)
    return SimpleNamespace(ctx=ctx, params=Params(), layers=[], init="torch", key=(5, 1), config=cfg)


def check_layer(net, layer, forward, inputs, backward=None, full=100):
    """forward() reads `inputs`; backward(dout) gives their gradients (default: the layer's, of one input)."""
    names, rng = list(inputs), np.random.default_rng(3)
    net.params.allocate(net.ctx, 1)
    net.params.data += 0.2 * rng.standard_normal(net.params.data.shape)  # norms too are not just 1 and 0
    start = rng.standard_normal(net.params.grad.shape)
    probed = inputs | {name: net.params[name].data for name in net.params}

    def run():
        for each in net.layers:
            each._stack.clear()
        net.ctx.saving = True  # dropout, too, is on
        out = forward()
        net.ctx.saving = False
        return out

    def gradients(dout):
        run()
        net.params.grad[...] = start
        got = backward(dout) if backward else layer.backward(dout)
        got = got if isinstance(got, tuple) else (got,)
        assert not any(each._stack for each in net.layers)
        grads = dict(zip(names, got))
        for name in net.params:
            p = net.params[name]
            grads[name] = p.grad - start[p.start : p.start + p.size].reshape(p.shape)
        return grads

    check_gradient(run, gradients, probed, full)


@pytest.mark.parametrize("residual", [False, True])
def test_layer_linear(residual):
    net, v = network(), arrays(0, x=(3, 4), residual=(3, 5))
    layer = layers.Linear(net, "linear", 4, 5)
    if residual:
        forward, backward = (
            lambda: layer.forward(v["x"], v["residual"]),
            lambda dout: (layer.backward(dout), dout),
        )
        check_layer(net, layer, forward, v, backward)
    else:
        check_layer(net, layer, lambda: layer.forward(v["x"]), dict(x=v["x"]))


@pytest.mark.parametrize("stride, pad, size", [(1, None, (3, 4)), (2, (0, 1), (1, 2)), (2, (1, 1), (2, 2))])
def test_layer_conv(stride, pad, size):
    net, v = network(), arrays(1, x=(2, 3, 4, 2), emb=(2, 3), residual=(2, *size, 3))
    layer = layers.Conv2d(net, "conv", 2, 3, stride=stride, pad=pad)
    check_layer(net, layer, lambda: layer.forward(**v), v, lambda dout: (*layer.backward(dout), dout))


@pytest.mark.parametrize("act", [None, "silu", "mish"])
@pytest.mark.parametrize("modulated", [False, True])
def test_layer_groupnorm(act, modulated):
    if modulated and not act:
        pytest.skip("modulation is always followed by an activation")
    net, v = network(), arrays(2, x=(2, 2, 3, 4)) | (arrays(1, emb=(2, 8)) if modulated else {})
    layer = layers.GroupNorm(net, "norm", 4, 2, 1e-5, act)

    def forward():
        out = layer.forward(**v)
        assert np.array_equal(layer.again(), out)
        return out

    check_layer(net, layer, forward, v)


@pytest.mark.parametrize("head, groups, divisor", [(4, 2, 1), (2, 2, 1), (3, 2, 1.5), (2, None, 2)])
def test_layer_attention(head, groups, divisor):
    """Also with heads that leave a channel over, and without a norm."""
    net, v = network(), arrays(3, x=(2, 2, 2, 4))
    layer = layers.Attention(net, "attention", 4, head, groups, 1e-5, divisor)
    check_layer(net, layer, lambda: layer.forward(v["x"]), v)


def test_layer_upsample():
    net, v = network(), arrays(4, x=(1, 2, 3, 2))
    layer = layers.Upsample(net, "up", 2)
    check_layer(net, layer, lambda: layer.forward(v["x"]), v)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("H, W", [(4, 6), (5, 3)])
def test_layer_downsample(padding, H, W):
    net, v = network(), arrays(5, x=(2, H, W, 2))
    layer = layers.Downsample(net, "down", 2, padding)
    check_layer(net, layer, lambda: layer.forward(v["x"]), v)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_layer_dropout(rate):
    net, v = network(), arrays(6, x=(2, 3, 2, 3))
    layer = layers.Dropout(net, rate)
    check_layer(net, layer, lambda: layer.forward(v["x"]), v)
    net.ctx.saving = True
    assert (layer.forward(v["x"]) == 0).any() == (rate > 0)


@pytest.mark.parametrize(
    "classes, flip, shift, act",
    [
        (None, False, 1, "silu"),
        (3, True, 0, "gelu"),
        ("timestep", True, 0, "mish"),
        ("identity", False, 0, "silu"),
    ],
)
def test_layer_time_embedding(classes, flip, shift, act):
    net, labels = network(), np.array([2, 0, 2]) if classes else None
    labels = np.random.default_rng(0).standard_normal((3, 5)) if classes == "identity" else labels
    layer = layers.TimeEmbedding(net, 6, 5, flip, shift, classes, act)
    check_layer(
        net,
        layer,
        lambda: layer.forward(np.array([0, 3, 900]), labels),
        {},
        lambda dout: layer.backward(dout),
    )


@pytest.mark.parametrize(
    "C, O, way, divisor, fields",
    [
        (4, 4, None, 1, {}),
        (4, 6, None, 1, {}),  # a convolution in the shortcut
        (4, 4, None, 1, dict(dropout=0.3)),
        (4, 6, None, 1.5, dict(resnet_time_scale_shift="scale_shift", dropout=0.3)),
        (4, 4, "up", 1, dict(act_fn="mish")),
        (4, 4, "down", 1, {}),
        (4, 4, "down", 2, dict(resnet_time_scale_shift="scale_shift", act_fn="gelu")),
    ],
)
def test_resblock(C, O, way, divisor, fields):
    net, v = network(**fields), arrays(8, x=(2, 2, 4 if way else 3, C), emb=(2, 3))
    block = ResBlock(net, "block", C, O, 3, way, divisor)
    assert (block.shortcut is None) == (C == O)
    check_layer(net, block, lambda: block.forward(v["x"], v["emb"]), v, block.backward, full=50)


# ---- networks of two levels ----
SMALL = dict(
    in_channels=2, out_channels=2, block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
NETWORKS = {
    "classes, dropout, symmetric padding": dict(num_class_embeds=3, dropout=0.2, downsample_padding=1),
    "DDPM's padding, deep, one head": dict(
        downsample_padding=0, layers_per_block=2, attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1
    ),  # fmt: skip
    "no middle": dict(mid_block_type=None),
    "a middle norm of its own, mish, identity": dict(
        attn_norm_num_groups=4, act_fn="mish", class_embed_type="identity", time_embedding_dim=6
    ),
    "scale and shift, resnet up and down, scaled middle, centred": dict(
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
        down_block_types=("AttnDownBlock2D",) * 2, up_block_types=("AttnUpBlock2D",) * 2,
        mid_block_scale_factor=1.5, center_input_sample=True, attention_head_dim=3, dropout=0.1,
    ),
    "gelu, waves of the labels, odd width": dict(
        act_fn="gelu", class_embed_type="timestep", block_out_channels=(3, 6), norm_num_groups=1,
        attention_head_dim=None, add_attention=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_unet(name):
    """x and every tensor of weights along two random directions; tensors of up to four element by element."""
    cfg = UNetConfig(**SMALL | NETWORKS[name])
    model = UNet(cfg, device="ref", dtype=np.float64, init="torch")
    rng = np.random.default_rng(0)
    model.params.data += 0.1 * rng.standard_normal(model.params.data.shape)
    start = rng.standard_normal(model.params.grad.shape)
    x, t = rng.standard_normal((2, 4, 6, 2)), np.array([3, 700])
    labels = np.array([2, 0]) if cfg.num_class_embeds or cfg.class_embed_type == "timestep" else None
    labels = rng.standard_normal((2, 6)) if cfg.class_embed_type == "identity" else labels

    def forward():
        return model.forward(x, t, labels, key=(1, 2))

    def gradients(dout):
        forward()
        model.params.grad[...] = start
        got = dict(x=model.backward(dout))
        for n in model.params:
            p = model.params[n]
            got[n] = p.grad - start[p.start : p.start + p.size].reshape(p.shape)
        return got

    inputs = dict(x=x) | {n: model.params[n].data for n in model.params}
    check_gradient(forward, gradients, inputs, full=4)
    reached = gradients(rng.standard_normal(forward().shape))
    assert all(np.abs(g).max() > 1e-8 or n.endswith("to_k.bias") for n, g in reached.items())
