"""The same numbers as PyTorch: baseline and diffusers, nanodiff and the baseline, 20 training steps."""

import sys
from pathlib import Path

import numpy as np
import pytest

import nanodiff as nd
from nanodiff.kernels.parallel_cpu import AMX

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import baseline_torch  # noqa: E402
from train_step import NETWORKS  # noqa: E402

TINY = dict(  # two levels, attention with two heads on the way down, in the middle and on the way up
    sample_size=8,
    in_channels=3,
    out_channels=3,
    block_out_channels=(16, 32),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=16,
)
CLASSES = TINY | dict(
    num_class_embeds=5, freq_shift=1, attention_head_dim=8, downsample_padding=0, add_attention=False
)
CIFAR_PADDED = NETWORKS["cifar10"]  # sine first, freq_shift 1, one head, padding on the right and bottom only


def relative(a, b):
    """L2 distance over the L2 norm of b, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def batch(config, B, seed=0, size=None):
    """x, target (B,H,W,C), t (B,), labels or None"""
    rng = np.random.default_rng(seed)
    shape = (B, *(size or (config["sample_size"],) * 2), config["in_channels"])
    labels = rng.integers(0, config["num_class_embeds"], B) if config.get("num_class_embeds") else None
    x, target = rng.standard_normal((2, *shape), dtype=np.float32)
    return x, target, rng.integers(0, 1000, B), labels


def nchw(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def to_nanodiff(name, tensor):
    """One PyTorch weight or gradient in nanodiff's layout."""
    array = tensor.detach().numpy()
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 and name != "class_embedding.weight" else array


def load_weights(params, state):
    """Copy a PyTorch state_dict into nanodiff's parameters; both must have the same names and shapes."""
    assert sorted(params) == sorted(state)
    for name in params:
        value = to_nanodiff(name, state[name])
        assert params[name].data.shape == value.shape, name
        params[name].data[...] = value


def torch_gradients(model, x, target, t, labels, **call):
    """out and {name: gradient} of the mean squared error"""
    out = model(x, t, labels, **call)
    out = out[0] if isinstance(out, tuple) else out
    model.zero_grad()
    torch.nn.functional.mse_loss(out, target).backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [TINY, CLASSES, CIFAR_PADDED], ids=["tiny", "classes", "ddpm-cifar10-32"])
def test_baseline_equals_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel(**config)
    torch.manual_seed(0)
    x, target, t, labels = batch(config, 2, size=(16, 16))
    x, target, t = nchw(x), nchw(target), torch.from_numpy(t)
    labels = None if labels is None else torch.from_numpy(labels)
    want, want_grad = torch_gradients(theirs, x, target, t, labels, return_dict=False)
    for channels_last in (False, True):
        ours, place = baseline_torch.build(config, channels_last=channels_last)
        ours.load_state_dict(theirs.state_dict())
        out, grad = torch_gradients(ours, place(x), place(target), t, labels)
        assert relative(out, want) < 1e-5  # float32 sums in another order
        assert grad.keys() == want_grad.keys()
        total = np.sqrt(sum(float(g.double().square().sum()) for g in want_grad.values()))
        for name, g in want_grad.items():
            # to_k.bias has a gradient of exactly zero, so its rounding noise is held to the whole norm
            limit = 1e-4 * float(g.norm()) if not name.endswith("to_k.bias") else 1e-6 * total
            assert float((grad[name] - g).norm()) <= limit, name


def test_baseline_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="time_embedding_type = 'fourier'.*'positional'"):
        baseline_torch.UNet(TINY | dict(time_embedding_type="fourier"))


def test_named_networks_have_the_known_sizes():
    for name, count in {"cifar10": 35_746_307, "small": 3_939_393, "mid64": 12_559_939}.items():
        with torch.device("meta"):
            model = baseline_torch.UNet(NETWORKS[name])
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("ref", "float32"), ("ref", "float64")])
@pytest.mark.parametrize("config", [TINY, CLASSES], ids=["tiny", "classes"])
def test_unet_equals_pytorch(config, device, dtype):
    forward_limit, limit = (1e-5, 1e-4) if dtype == "float32" else (1e-12, 1e-10)
    if device == "cpu" and AMX:  # products of pairs of bfloat16: 4e-6 each, through some twenty layers
        forward_limit = 4e-5
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        theirs, _ = baseline_torch.build(config)
    finally:
        torch.set_default_dtype(torch.float32)
    ours = nd.UNet(nd.UNetConfig.from_dict(config), device=device, dtype=dtype)
    load_weights(ours.params, theirs.state_dict())

    x, target, t, labels = batch(config, 3, size=(6, 10))
    x, target = x.astype(dtype), target.astype(dtype)
    given = nchw(x).requires_grad_()
    torch_labels = None if labels is None else torch.from_numpy(labels)
    want, want_grad = torch_gradients(theirs, given, nchw(target), torch.from_numpy(t), torch_labels)

    out = ours.forward(ours.ctx.to_device(x), t, labels)
    _, dout = ours.ctx.k.mse_loss(out, ours.ctx.to_device(target))
    dx = ours.backward(dout)
    assert relative(nchw(ours.ctx.to_host(out)), want) <= forward_limit
    assert relative(nchw(ours.ctx.to_host(dx)), given.grad) <= limit
    total = np.sqrt(sum(float(g.double().square().sum()) for g in want_grad.values()))
    for name, g in want_grad.items():
        error = np.linalg.norm(ours.ctx.to_host(ours.params[name].grad) - to_nanodiff(name, g))
        assert error <= (limit / 100 * total if name.endswith("to_k.bias") else limit * float(g.norm())), name


@pytest.mark.parametrize("device", ["cpu", "ref"])
def test_twenty_steps_of_training_equal_pytorch(device):
    lr, clip, decay, steps, B = 1e-3, 1.2, 0.999, 20, 4
    theirs, _ = baseline_torch.build(TINY)
    ours = nd.UNet(nd.UNetConfig.from_dict(TINY), device=device)
    load_weights(ours.params, theirs.state_dict())
    adam = torch.optim.Adam(theirs.parameters(), lr=lr)
    average = {name: w.clone() for name, w in theirs.state_dict().items()}
    opt = nd.Adam(ours.params, lr=lr, clip=clip, ema=decay)
    diff = nd.Diffusion(schedule="cosine", prediction="eps")
    k, to_device = ours.ctx.k, ours.ctx.to_device

    rng, norms, losses, want_losses = np.random.default_rng(1), [], [], []
    least = {}  # the smallest gradient of each weight in any step, as a share of the largest of its tensor
    for n in range(steps):
        x0 = rng.uniform(-1, 1, (B, 8, 8, 3)).astype(np.float32)
        eps = rng.standard_normal(x0.shape, dtype=np.float32)
        t = rng.integers(0, diff.timesteps, B)

        xt, target = k.q_sample(to_device(x0), to_device(eps), *map(to_device, diff.scales(t)), "eps")
        loss, dout = k.mse_loss(ours.forward(xt, t), target)
        ours.params.grad[...] = 0
        ours.backward(dout)
        opt.step(loss)
        losses.append(float(ours.ctx.to_host(loss)[0]))

        alpha_bar = torch.from_numpy(diff.alpha_bar[t])[:, None, None, None]
        noised = (alpha_bar.sqrt() * nchw(x0) + (1 - alpha_bar).sqrt() * nchw(eps)).float()
        want = torch.nn.functional.mse_loss(theirs(noised, torch.from_numpy(t)), nchw(eps))
        adam.zero_grad()
        want.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)))
        for name, w in theirs.named_parameters():
            share = w.grad.abs() / w.grad.abs().max()
            least[name] = torch.minimum(least.get(name, share), share)
        adam.step()
        for name, w in theirs.state_dict().items():
            average[name].lerp_(w, 1 - min(decay, (1 + n) / (10 + n)))
        want_losses.append(want.item())

    assert min(norms) < clip < max(norms)  # both branches of the clipping were taken
    assert want_losses[-1] < 0.9 * want_losses[0]  # and something was learned
    np.testing.assert_allclose(losses, want_losses, rtol=1e-4)
    # The gradient of to_k.bias is zero, so Adam walks along the signs of its rounding noise. Elsewhere noise
    # moves a few weights of nearly zero gradient: 3e-6 of the norm of all. A decay one step late makes 3e-4.
    names = [name for name in average if not name.endswith("to_k.bias")]
    with opt.with_ema():
        got = np.concatenate([np.ravel(ours.params[name].data) for name in names])
    wanted = np.concatenate([np.ravel(to_nanodiff(name, average[name])) for name in names])
    if AMX and device == "cpu":
        # Where a gradient is below 4e-6 of the largest, its sign is noise of bfloat16 pairs: one or two
        # weights in each of the first steps go the other way, by up to lr. Which ones is chance; a single one
        # is 4e-5 of the norm of all. Five of such weights are left to that, and all others held to less.
        assert np.abs(got - wanted).max() <= 3 * lr
        order = np.argsort(np.abs(got - wanted))
        same, apart = order[:-5], order[-5:]
        edge = np.concatenate([np.ravel(to_nanodiff(name, least[name])) for name in names])
        assert edge[apart].max() <= 1e-5  # so none of them hides an error
        assert relative(got[same], wanted[same]) <= 2e-5
    else:
        assert relative(got, wanted) <= 3e-5
