"""Every field of UNetConfig against diffusers' UNet2DModel: names, shapes, forward and gradients.

The networks are drawn from seeds. Both sides run in one child process, with plain float32 sums
(NANODIFF_CONV=direct): the matrix unit and Winograd cost a digit that would hide an error.
"""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import nanodiff as nd

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
SEEDS = range(20, 48)
FORWARD, GRADIENT = 1e-5, 1e-4  # float32 sums of up to 576 products, in another order, through 60 layers


def pick(rng, *values):
    return values[rng.integers(len(values))]


def drawn(seed):
    """A small network; every field is drawn, but for what only a checkpoint's reader looks at."""
    rng = np.random.default_rng(seed)
    levels, groups = int(rng.integers(1, 4)), int(pick(rng, 1, 2, 3, 4))
    channels = [groups * int(rng.integers(1, 6)) for _ in range(levels)]
    channels = [c if c > 2 else 4 * c for c in channels]  # one or two channels to a whole norm say nothing
    layers = int(pick(rng, 1, 1, 2, 3))
    if seed % 9 == 8:
        channels, layers = channels[:1] * levels, 0
    return dict(
        sample_size=pick(rng, None, 16, [8, 16]),
        in_channels=int(pick(rng, 1, 2, 3)),
        out_channels=int(pick(rng, 1, 3, 4)),
        center_input_sample=bool(pick(rng, False, True)),
        time_embedding_type="positional",
        time_embedding_dim=pick(rng, None, 10, 16),
        freq_shift=int(pick(rng, 0, 1)) if channels[0] // 2 != 1 else 0,
        flip_sin_to_cos=bool(pick(rng, False, True)),
        down_block_types=[pick(rng, DOWN, ATTN_DOWN) for _ in range(levels)],
        mid_block_type=pick(rng, "UNetMidBlock2D", "UNetMidBlock2D", None),
        up_block_types=[pick(rng, UP, ATTN_UP) for _ in range(levels)],
        block_out_channels=channels,
        layers_per_block=layers,
        mid_block_scale_factor=pick(rng, 1, 2**0.5, 2),
        downsample_padding=int(pick(rng, 0, 1)),
        downsample_type=pick(rng, "conv", "resnet"),
        upsample_type=pick(rng, "conv", "resnet"),
        dropout=0.0,
        act_fn=pick(rng, "silu", "swish", "mish", "gelu", "relu"),
        attention_head_dim=pick(rng, None, int(rng.integers(1, min(channels) + 1))),
        norm_num_groups=groups,
        attn_norm_num_groups=pick(rng, None, 1, channels[-1]),
        norm_eps=pick(rng, 1e-5, 1e-6, 1e-3),
        resnet_time_scale_shift=pick(rng, "default", "scale_shift"),
        add_attention=bool(pick(rng, True, True, False)),
        class_embed_type=pick(rng, None, None, "timestep", "identity"),
        num_class_embeds=pick(rng, None, 5),
        num_train_timesteps=pick(rng, None, 1000),
    )


def published(channels, attention, head=None, groups=32, **fields):
    """A config shaped like google's DDPMs. attention: the one level that has it, the first one being 0."""
    n = range(len(channels))
    return dict(
        block_out_channels=channels, norm_num_groups=groups, norm_eps=1e-6, attention_head_dim=head,
        down_block_types=[ATTN_DOWN if i == attention else DOWN for i in n],
        up_block_types=[ATTN_UP if i == attention else UP for i in reversed(n)],
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, **fields,
    )  # fmt: skip


LARGE = [128, 128, 256, 256, 512, 512]
PUBLISHED = {
    "ddpm-cifar10-32": (35_746_307, (32, 32), published([128, 256, 256, 256], 1, sample_size=32)),
    "ddpm-celebahq-256": (113_673_219, (32, 64), published(LARGE, 4, sample_size=256)),
    "ddpm-church-256": (
        113_673_219,
        (64, 32),
        published(LARGE, 4, sample_size=256, mid_block_scale_factor=1),
    ),
}


# ---- the child process ----
def relative(a, b, floor=0.0):
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor))


def compare(config, size, devices, gradients=True, seed=0):
    """Errors of nanodiff against diffusers, and what their state_dicts disagree in."""
    import diffusers
    import torch
    from test_torch_parity import load_weights, nchw, to_nanodiff

    torch.manual_seed(seed)
    rng, B = np.random.default_rng(seed), 2 if gradients else 1
    theirs = diffusers.UNet2DModel(**config)
    if gradients:  # norms are not just 1 and 0
        with torch.no_grad():
            for p in theirs.parameters():
                p += 0.1 * torch.randn(p.shape)
    x = rng.standard_normal((B, *size, theirs.config.in_channels), dtype=np.float32)
    t, labels, given = rng.integers(0, 1000, B), None, nchw(x).requires_grad_()
    if theirs.config.class_embed_type == "identity":
        labels = rng.standard_normal((B, theirs.time_embedding.linear_2.out_features), dtype=np.float32)
    elif theirs.config.class_embed_type == "timestep":
        labels = rng.uniform(0, 50, B).astype(np.float32)
    elif theirs.config.num_class_embeds:
        labels = rng.integers(0, theirs.config.num_class_embeds, B)
    with torch.set_grad_enabled(gradients):
        want = theirs(given, torch.from_numpy(t), None if labels is None else torch.from_numpy(labels)).sample
    dout = rng.standard_normal(want.shape, dtype=np.float32)
    if gradients:
        want.backward(torch.from_numpy(dout))
    state, errors = theirs.state_dict(), dict(count=sum(p.numel() for p in theirs.parameters()))
    for device in devices:
        ours = nd.UNet(nd.UNetConfig.from_dict(config), device=device)
        wrong = [n for n in {*ours.params} ^ {*state}]
        wrong += [
            n for n in ours.params if n in state and ours.params[n].shape != to_nanodiff(n, state[n]).shape
        ]
        errors |= dict(wrong=wrong, ours=ours.params.count)
        if wrong:
            return errors
        load_weights(ours.params, state)
        out = ours.forward(x, t, labels)
        errors[device] = dict(forward=relative(nchw(out), want.detach()))
        if gradients:
            dx = ours.backward(np.ascontiguousarray(np.moveaxis(dout, 1, -1)))
            total = np.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs.parameters()))
            per_tensor = {
                n: relative(ours.params[n].grad, to_nanodiff(n, p.grad), 1e-3 * total)
                for n, p in theirs.named_parameters()
            }
            errors[device] |= dict(dx=relative(nchw(dx), given.grad), gradient=max(per_tensor.values()))
            errors[device] |= dict(worst=max(per_tensor, key=per_tensor.get))
    return errors


def every_comparison():
    for seed in SEEDS:
        yield str(seed), compare(drawn(seed), (8, 16), ("cpu", "ref"), seed=seed)
    for name, (_, size, config) in PUBLISHED.items():
        yield name, compare(config, size, ("cpu",), gradients=False)


if __name__ == "__main__":
    print(json.dumps(dict(every_comparison())))


# ---- what it must have found ----
@pytest.fixture(scope="module")
def compared():
    for package in ("torch", "diffusers"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    root = Path(__file__).parents[1]
    env = os.environ | dict(NANODIFF_CONV="direct", NANODIFF_AMX="0")
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_drawn_network_equals_diffusers(compared, seed):
    found = compared[str(seed)]
    assert found["wrong"] == [] and found["ours"] == found["count"]
    for device in ("cpu", "ref"):
        assert found[device]["forward"] <= FORWARD and found[device]["dx"] <= GRADIENT, (
            device,
            found[device],
        )
        assert found[device]["gradient"] <= GRADIENT, (device, found[device])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_equals_diffusers(compared, name):
    found, count = compared[name], PUBLISHED[name][0]
    assert found["wrong"] == [] and found["ours"] == found["count"] == count
    assert found["cpu"]["forward"] <= FORWARD


def test_the_draw_takes_every_value_of_every_field():
    """Where a field matters: the resnet samplers below attention blocks, the middle's norm in a middle."""
    configs = [drawn(seed) for seed in SEEDS]
    assert set(configs[0]) == {f.name for f in dataclasses.fields(nd.UNetConfig)}
    seen = {name: {str(c[name]) for c in configs} for name in configs[0]}
    assert all(
        len(values) >= 2 for name, values in seen.items() if name not in ("dropout", "time_embedding_type")
    )
    assert len(seen["act_fn"]) == 5 and {"0", "1", "2", "3"} == seen["layers_per_block"]
    assert any(c["block_out_channels"][0] % 2 for c in configs) and seen["attention_head_dim"] > {"None"}

    def attends(c):
        return c["mid_block_type"] and c["add_attention"]

    n = [c for c in configs if len(c["block_out_channels"]) > 1]
    assert sum(c["downsample_type"] == "resnet" and ATTN_DOWN in c["down_block_types"][:-1] for c in n) >= 3
    assert sum(c["upsample_type"] == "resnet" and ATTN_UP in c["up_block_types"][:-1] for c in n) >= 3
    assert sum(c["downsample_type"] == "resnet" and DOWN in c["down_block_types"][:-1] for c in n) >= 1
    for shift in ("default", "scale_shift"):
        of = [c for c in configs if c["resnet_time_scale_shift"] == shift]
        assert len({c["act_fn"] for c in of}) >= 4
        assert {c["attn_norm_num_groups"] is None for c in of if attends(c)} == {True, False}
        assert {c["mid_block_scale_factor"] for c in of if attends(c)} >= {2**0.5, 2}
    assert {(c["class_embed_type"], c["num_class_embeds"]) for c in configs} >= {
        (kind, n) for kind in (None, "timestep", "identity") for n in (None, 5)
    }
