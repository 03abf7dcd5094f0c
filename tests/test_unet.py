"""The network: names, shapes and counts of its weights, forward against predict, what it keeps and leaves."""

import numpy as np
import pytest

import nanodiff as nd
from nanodiff.kernels import parallel_cpu
from nanodiff.kernels.parallel_cpu import AMX
from nanodiff.params import Params
from nanodiff.unet import UNet, UNetConfig

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"


@pytest.fixture
def on_paper(monkeypatch):
    """Networks that have names and shapes but no memory."""
    monkeypatch.setattr(Params, "allocate", lambda self, ctx, seed: None)


def described(channels, attention, head, groups=8, layers=2, **fields):
    """A config of diffusers' kind; `attention`: which levels have it, the first one being 0."""
    n = len(channels)
    return UNetConfig.from_dict(
        dict(
            block_out_channels=channels, norm_num_groups=groups, attention_head_dim=head,
            layers_per_block=layers,
            down_block_types=[ATTN_DOWN if i in attention else DOWN for i in range(n)],
            up_block_types=[ATTN_UP if i in attention else UP for i in reversed(range(n))], **fields,
        )
    )  # fmt: skip


ONE = dict(in_channels=1, out_channels=1)
COUNTS = [
    (35_746_307, described((128, 256, 256, 256), {1}, None, groups=32, norm_eps=1e-6, downsample_padding=0)),
    (113_673_219, described((128, 128, 256, 256, 512, 512), {4}, 8, groups=32)),
    (15_890_753, described((32, 64, 128, 256), {1, 2, 3}, 8, **ONE)),
    (15_891_907, described((32, 64, 128, 256), {1, 2, 3}, 8)),
    (3_983_009, described((16, 32, 64, 128), {1, 2, 3}, 8, **ONE)),
    (4_023_233, described((32, 64, 128), {1, 2}, None, **ONE)),
    (3_939_393, described((32, 64, 128), {2}, 8, **ONE)),
    (12_559_939, described((64, 128, 128, 256), {3}, 8, layers=1)),
    (701_345, described((32, 64), {1}, 8, layers=1, **ONE)),
]


@pytest.mark.parametrize("count, config", COUNTS, ids=[str(count) for count, _ in COUNTS])
def test_number_of_weights(on_paper, count, config):
    model = UNet(config)
    assert model.params.count == count
    assert len({p.name for p in map(model.params.__getitem__, model.params)}) == len(model.params)


def test_number_of_tensors_of_ddpm_cifar10(on_paper):
    assert len(UNet(COUNTS[0][1]).params) == 328


def test_names_and_shapes(on_paper):
    """Of a network with every kind of part, in diffusers' names: written out here, not derived."""
    config = described((8, 16), {1}, 8, groups=4, layers=1, in_channels=2, out_channels=3, num_class_embeds=5)
    params = UNet(config).params

    def pair(shape):
        return dict(weight=shape, bias=shape[-1:])

    def resnet(C, O):
        parts = dict(
            norm1=pair((C,)), conv1=pair((3, 3, C, O)), time_emb_proj=pair((32, O)), norm2=pair((O,))
        )
        parts |= dict(conv2=pair((3, 3, O, O))) | ({} if C == O else dict(conv_shortcut=pair((1, 1, C, O))))
        return {f"{a}.{b}": shape for a, d in parts.items() for b, shape in d.items()}

    def attention(C):
        parts = {"group_norm": pair((C,))} | {n: pair((C, C)) for n in ("to_q", "to_k", "to_v", "to_out.0")}
        return {f"{a}.{b}": shape for a, d in parts.items() for b, shape in d.items()}

    want = {
        "conv_in": pair((3, 3, 2, 8)),
        "time_embedding.linear_1": pair((8, 32)),
        "time_embedding.linear_2": pair((32, 32)),
        "class_embedding": dict(weight=(5, 32)),
        "down_blocks.0.resnets.0": resnet(8, 8),
        "down_blocks.0.downsamplers.0.conv": pair((3, 3, 8, 8)),
        "down_blocks.1.resnets.0": resnet(8, 16),
        "down_blocks.1.attentions.0": attention(16),
        "mid_block.resnets.0": resnet(16, 16),
        "mid_block.attentions.0": attention(16),
        "mid_block.resnets.1": resnet(16, 16),
        "up_blocks.0.resnets.0": resnet(16 + 16, 16),
        "up_blocks.0.attentions.0": attention(16),
        "up_blocks.0.resnets.1": resnet(16 + 8, 16),
        "up_blocks.0.attentions.1": attention(16),
        "up_blocks.0.upsamplers.0.conv": pair((3, 3, 16, 16)),
        "up_blocks.1.resnets.0": resnet(16 + 8, 8),
        "up_blocks.1.resnets.1": resnet(8 + 8, 8),
        "conv_norm_out": pair((8,)),
        "conv_out": pair((3, 3, 8, 3)),
    }
    want = {f"{a}.{b}": shape for a, d in want.items() for b, shape in d.items()}
    assert {name: params[name].shape for name in params} == want


# ---- a small network with attention, Winograd, direct and strided convolutions ----
CONFIG = dict(
    in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
    down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP),
)  # fmt: skip


def small(device="cpu", init="torch", **fields):
    return nd.UNet(UNetConfig(**CONFIG | fields), device=device, init=init)


def batch(B=2, H=8, W=12, C=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, H, W, C), dtype=np.float32), rng.integers(0, 1000, B)


def stacks(model):
    return sum(len(layer._stack) for layer in model.layers)


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("device", ["cpu", "ref"])
def test_predict_is_forward(device):
    model, (x, t) = small(device), batch()
    out = model.forward(x, t)
    assert out.shape == (2, 8, 12, 3) and out.dtype == np.float32
    assert stacks(model) > 20
    assert same_bits(out, model.predict(x, t))


def test_cpu_is_ref():
    (x, t), labels = batch(), np.array([1, 4])
    outs, grads = [], []
    for device in ("cpu", "ref"):
        model = small(device, num_class_embeds=5, dropout=0.2)
        outs.append(model.forward(x, t, labels, key=(3, 4)))
        grads.append([model.backward(np.ones_like(x)), model.params.grad])
    limit = 4e-5 if AMX else 1e-5  # about twenty layers, of products of bfloat16 pairs or of float32
    assert np.abs(outs[0] - outs[1]).max() < limit * np.abs(outs[1]).max()
    for a, b in zip(*grads):
        assert np.linalg.norm(a - b) < 3e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("device", ["cpu", "ref"])
def test_predict_keeps_nothing_and_backward_leaves_nothing(device):
    model, (x, t) = small(device), batch()
    model.predict(x, t)
    assert stacks(model) == 0
    model.forward(x, t)
    before = stacks(model)
    model.predict(*batch(1, 4, 4))  # a sample drawn between a forward and its backward
    assert stacks(model) == before
    dx = model.backward(np.ones_like(x))
    assert dx.shape == x.shape and stacks(model) == 0
    first, _ = model.params.grad.copy(), model.params.grad.fill(0)
    for _ in range(2):  # a forward that no backward follows leaves no trace
        model.forward(x, t)
    model.backward(np.ones_like(x))
    assert stacks(model) == 0 and same_bits(first, model.params.grad)
    with pytest.raises(RuntimeError, match="call forward first"):
        model.backward(np.ones_like(x))


@pytest.mark.parametrize("device", ["cpu", "ref"])
def test_a_backward_without_the_gradient_of_the_images(device):
    model, (x, t), grads = small(device, center_input_sample=True), batch(), []
    for wants_dx in (True, False):
        model.params.grad[...] = 0
        model.forward(x, t)
        dx = model.backward(np.ones_like(x), wants_dx)
        assert (dx is None) != wants_dx
        grads.append(model.params.grad.copy())
    assert same_bits(*grads)


def test_backward_adds_into_the_gradients():
    model, (x, t) = small(), batch()
    model.forward(x, t)
    model.backward(np.ones_like(x))
    once = model.params.grad.copy()
    model.forward(x, t)
    model.backward(np.ones_like(x))
    assert np.linalg.norm(model.params.grad - 2 * once) < 1e-6 * np.linalg.norm(once)


def test_nothing_outside_is_written_into():
    model, (x, t) = small(num_class_embeds=5), batch()
    dout, labels = np.ones_like(x), np.array([0, 4])
    handed = [x, t, dout, labels, model.params.data]
    copies = [a.copy() for a in handed]
    model.forward(x, t, labels)
    model.backward(dout)
    assert all(same_bits(a, b) for a, b in zip(handed, copies))


@pytest.mark.parametrize("device", ["cpu", "ref"])
def test_frozen_gives_the_same_bits_and_is_cleared(device):
    model, (x, t) = small(device), batch()
    want = model.predict(x, t)
    with model.frozen():
        assert same_bits(model.predict(x, t), want) and len(model.ctx.frozen) > 10
        kept = dict(model.ctx.frozen)
        assert same_bits(model.predict(x, t), want)
        assert all(model.ctx.frozen[key] is kept[key] for key in kept)
        with model.frozen():  # inside another: nothing is thrown away
            assert same_bits(model.predict(x, t), want)
        assert model.ctx.frozen.keys() == kept.keys()
        model.predict(*batch(1, 4, 20))  # another size, where other convolutions are Winograd's
    assert model.ctx.frozen is None
    model.params.data *= 1.01
    assert not same_bits(model.predict(x, t), want)
    with pytest.raises(ZeroDivisionError), model.frozen():
        raise ZeroDivisionError
    assert model.ctx.frozen is None


SPECIAL = dict(  # what the default network has not
    act_fn="gelu", resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet",
    down_block_types=(ATTN_DOWN,) * 2, up_block_types=(ATTN_UP,) * 2, mid_block_scale_factor=2.0,
    center_input_sample=True,
)  # fmt: skip


@pytest.mark.parametrize("fields", [{}, SPECIAL], ids=["default", "special"])
@pytest.mark.parametrize("size", [(8, 8), (4, 6), (14, 10)])
def test_a_sample_does_not_depend_on_its_batch(size, fields):
    model = small(num_class_embeds=5, **fields)
    (x, t), labels = batch(16, *size), np.arange(16) % 5
    whole = model.predict(x, t, labels)
    for k in (0, 7, 15):
        alone = model.predict(x[k : k + 1], t[k : k + 1], labels[k : k + 1])
        assert same_bits(alone[0], whole[k])
    some = model.predict(x[3:8], t[3:8], labels[3:8])
    assert same_bits(some, whole[3:8])


def test_special_networks_give_the_same_bits_for_any_number_of_threads():
    model, (x, t), found = small(**SPECIAL), batch(), []
    try:
        for threads in {1, parallel_cpu.max_threads()}:
            nd.set_threads(threads)
            model.params.grad[...] = 0
            out = model.forward(x, t)
            found.append([out, model.backward(out), model.params.grad.copy()])
    finally:
        nd.set_threads(parallel_cpu.max_threads())
    assert all(same_bits(a, b) for a, b in zip(found[0], found[-1]))


def test_two_networks_coexist():
    """Two contexts, two devices, one in the middle of a step while the other takes one."""
    a, b, r = small(), small(layers_per_block=2), small("ref")
    (x, t), (y, s) = batch(), batch(3, 4, 8, seed=5)
    want = a.forward(x, t).copy()
    a.backward(want)
    want_grad = a.params.grad.copy()
    a.params.grad[...] = 0
    out = a.forward(x, t)
    with b.frozen():
        b.predict(y, s)
    b.backward(b.forward(y, s))
    r.backward(r.forward(x, t))
    assert same_bits(out, want)
    a.backward(out)
    assert same_bits(a.params.grad, want_grad)
    assert stacks(a) == stacks(b) == stacks(r) == 0 and a.ctx is not b.ctx


def test_ddpm_initialisation():
    """Residual branches and the output start at 0, so an untrained network says 0; the rest by their fans."""
    model, (x, t) = small(init="ddpm"), batch()
    assert not model.predict(x, t).any()
    for name in model.params:
        p, zero = model.params[name], ("conv2.", "to_out.0.", "conv_out.")
        if "norm" in name:
            assert (p.data == name.endswith("weight")).all()
        elif name.endswith("bias") or any(z in name for z in zero):
            assert not p.data.any(), name
        else:
            receptive = np.prod(p.shape[:-2])
            limit = np.sqrt(6 / (receptive * (p.shape[-2] + p.shape[-1])))
            assert 0.9 * limit < np.abs(p.data).max() <= limit, name
            assert abs(p.data.mean()) < 5 * limit / np.sqrt(3 * p.data.size)
    model.forward(x, t)
    dx = model.backward(np.ones_like(x))
    assert np.abs(model.params["conv_out.weight"].grad).max() > 0 and not dx.any()  # so it can leave zero


def test_torch_initialisation_and_seeds():
    model = small(init="torch")
    for name in model.params:
        if "norm" not in name:
            p, weight = model.params[name], model.params[name.rsplit(".", 1)[0] + ".weight"]
            limit = 1 / np.sqrt(np.prod(weight.shape[:-1]))
            assert 0.6 * limit < np.abs(p.data).max() <= limit * (1 + 1e-6), name
    again = {seed: nd.UNet(model.config, seed=seed, init="torch").params.data for seed in (0, 1)}
    assert same_bits(again[0], model.params.data) and not same_bits(again[1], model.params.data)
    on_ref = nd.UNet(model.config, device="ref", init="torch").params
    assert same_bits(on_ref.data, model.params.data)


def test_weights_are_aligned_views_of_one_array():
    params = small().params
    for name in params:
        p = params[name]
        assert np.shares_memory(p.data, params.data) and np.shares_memory(p.grad, params.grad)
        assert p.start % 16 == 0 and p.data.shape == p.grad.shape == p.shape
    params.grad[...] = 1
    assert all((params[name].grad == 1).all() for name in params)
    params["conv_in.bias"].data[...] = 5
    assert (params.data == 5).sum() == 16


def test_dropout():
    model, (x, t) = small(dropout=0.5), batch()
    a, b, c = (model.forward(x, t, key=key) for key in ((1, 2), (1, 2), (1, 3)))
    assert same_bits(a, b) and not same_bits(a, c)
    assert same_bits(model.predict(x, t), small().predict(x, t))  # none of it while sampling
    whole = model.forward(x, t, key=(1, 2))
    assert same_bits(whole[:1], model.forward(x[:1], t[:1], key=(1, 2)))  # a mask of each sample's own


def test_labels_change_the_output():
    model, (x, t) = small(num_class_embeds=5), batch()
    a, b = (model.predict(x, t, np.array(labels)) for labels in ([0, 1], [0, 2]))
    assert same_bits(a[0], b[0]) and not same_bits(a[1], b[1])


def test_labels_of_every_kind():
    """Numbers with waves of their own, and embeddings that are added to that of the time."""
    (x, t), numbers = batch(), np.array([0.5, 20.0])
    model = small(class_embed_type="timestep")
    one, other = (model.predict(x, t, labels) for labels in (numbers, numbers + [0, 1]))
    assert same_bits(one[0], other[0]) and not same_bits(one[1], other[1])
    assert same_bits(model.predict(x, t, np.array([3, 20])), model.predict(x, t, np.array([3.0, 20.0])))
    model = small(class_embed_type="identity", num_class_embeds=5)  # the second is ignored, as diffusers does
    assert "class_embedding.weight" not in model.params
    embeddings = np.zeros((2, 64))
    embeddings[1] = 1
    out, plain = model.predict(x, t, embeddings), small().predict(x, t)
    assert same_bits(out[0], plain[0]) and not same_bits(out[1], plain[1])


REFUSED = {  # what this network has not, and what no network can be built from
    "time_embedding_type": ("fourier", "learned"),
    "down_block_types": ((DOWN, "SkipDownBlock2D"), (DOWN,), DOWN),
    "up_block_types": ((UP, "CrossAttnUpBlock2D"), ()),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("geglu", None),
    "resnet_time_scale_shift": ("spatial", "ada_group"),
    "class_embed_type": ("projection", "simple_projection"),
    "downsample_type": ("fir",),
    "upsample_type": ("fir", None),
    "downsample_padding": (2,),
    "norm_num_groups": (None, 0, 5),
    "attn_norm_num_groups": (5, 0),
    "attention_head_dim": (0, 64, 8.0),
    "mid_block_scale_factor": (0, "2"),
    "layers_per_block": (0, -1),
    "freq_shift": (8,),
    "sample_size": (7, (8, 8, 8)),
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in REFUSED.items() for v in values])
def test_refusals_name_the_field_and_the_value(field, value):
    with pytest.raises(nd.NanodiffError) as error:
        UNetConfig(**CONFIG | {field: value})
    line = str(error.value)
    assert line.startswith(f"UNetConfig.{field} = {value!r}: ") and "\n" not in line


@pytest.mark.parametrize(
    "labels, fields",
    [
        (None, dict(class_embed_type="timestep")),
        (np.array([1.0, np.nan]), dict(class_embed_type="timestep")),
        (np.zeros((2, 64)), dict(class_embed_type="timestep")),
        (np.zeros((2, 63)), dict(class_embed_type="identity")),
        (np.array([1, 2]), dict(class_embed_type="identity")),
        (np.array([0.0, 1.0]), dict(num_class_embeds=5)),
        (np.array([0, 5]), dict(num_class_embeds=5)),
        (np.array([0, 1]), {}),
    ],
)
def test_wrong_labels_are_refused(labels, fields):
    with pytest.raises(nd.NanodiffError, match="labels"):
        small(**fields).predict(*batch(), labels)


def test_config_survives_a_round_trip():
    config = COUNTS[0][1]
    assert UNetConfig.from_dict(config.to_dict() | dict(_class_name="UNet2DModel", unknown=1)) == config
    assert config.stride == 8 and UNetConfig(sample_size=[8, 12]).sample_size == (8, 12)
    assert UNetConfig.from_dict({}).block_out_channels == (224, 448, 672, 896)


def test_no_memory_is_taken_after_the_first_step(monkeypatch):
    """What a step needs is there from the one before. Kernels ask parallel_cpu for memory, it asks NumPy."""
    config = nd.UNetConfig(block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                           up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    model = nd.UNet(config)
    opt, diff = nd.Adam(model.params, clip=1.0, ema=0.99), nd.Diffusion()
    x0 = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 1)).astype(np.float32)
    taken, before = [], parallel_cpu._slab
    monkeypatch.setattr(parallel_cpu, "SLAB", 1 << 16)
    monkeypatch.setattr(parallel_cpu._shelf, "free", [])
    monkeypatch.setattr(parallel_cpu._arena, "free", [])
    monkeypatch.setattr(parallel_cpu, "_slab", lambda size: taken.append(size) or before(size))
    nd.train_step(model, opt, diff, x0)
    assert sum(taken) > 1e6
    taken.clear()
    for _ in range(3):
        nd.train_step(model, opt, diff, x0)
    assert taken == []
