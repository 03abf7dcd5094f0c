"""Folders in diffusers' layout, in and out; files that lie are refused in a line, before memory is made."""

import json
import re
import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy

import nanodiff as nd
from nanodiff import checkpoint
from nanodiff.diffusion import SCHEDULES
from nanodiff.unet import UNet

WEIGHTS = checkpoint.WEIGHTS_FILE
CONFIG = nd.UNetConfig(
    sample_size=(8, 12), in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
    attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return UNet(CONFIG, device="ref", seed=1, init="torch")


@pytest.fixture(scope="module")
def trained():
    """A network after three steps of Adam: its weights are none of those that it was made with."""
    model = UNet(CONFIG, device="cpu", seed=2)
    start, opt = model.params.data.copy(), nd.Adam(model.params, lr=1e-3)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 1)).astype(np.float32)
    for step in range(3):
        nd.train_step(model, opt, nd.Diffusion(50), images, key=(0, step))
    moved = [(model.params[n].data != start[p.start :][: p.size].reshape(p.shape)).mean() for n, p in
             ((n, model.params[n]) for n in model.params) if "to_k.bias" not in n]  # fmt: skip
    assert np.median(moved) > 0.99
    return model


def same_bits(a, b):
    return list(a.params) == list(b.params) and all(
        a.params[n].data.tobytes() == b.params[n].data.tobytes() for n in a.params
    )


def picture(B=2):
    x = np.random.default_rng(0).standard_normal((B, 8, 12, 1)).astype(np.float32)
    return x, np.array([3, 40])[:B]


def theirs(net, x, t):
    import torch

    with torch.no_grad():
        out = net(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy()
    return out.transpose(0, 2, 3, 1)


def rewrite(folder, change):
    """Change the tensors of a model's file, a dictionary."""
    tensors = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save(change(tensors) or tensors))


# ---- with diffusers


def test_a_trained_network_goes_to_diffusers_and_comes_back_with_the_same_bits(trained, tmp_path):
    """Outputs differ by float32 rounding over about 20 layers in another order of summation."""
    diffusers = pytest.importorskip("diffusers")
    trained.save_pretrained(tmp_path / "ours")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    x, t = picture()
    np.testing.assert_allclose(trained.predict(x, t), theirs(net, x, t), rtol=1e-4, atol=1e-5)
    net.save_pretrained(tmp_path / "theirs")
    back = UNet.from_pretrained(tmp_path / "theirs")
    assert same_bits(back, trained) and back.config == trained.config
    assert (back.predict(x, t) == trained.predict(x, t)).all()


def test_a_pipeline_of_ours_runs_in_diffusers(trained, tmp_path):
    """Five DDIM steps from the same noise differ by the network's rounding, which the steps hand on.

    Five divide 50: where they do not, diffusers' steps do not meet. Its option takes eps from the clipped
    image, as nanodiff always does.
    """
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    diffusion = nd.Diffusion(50, "cosine", "v")
    checkpoint.save_pretrained(trained, tmp_path, diffusion)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 8, 12, 1) and np.isfinite(made).all()
    run = checkpoint.load_run(tmp_path, "ref")
    assert run.sampling == dict(clip=True, dynamic=None, spacing="trailing")
    ddim, (x, _) = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler"), picture()
    ddim.set_timesteps(5)
    image = x
    for t in ddim.timesteps:
        pred = theirs(pipeline.unet, image, np.array([t, t]))
        pred, image = torch.from_numpy(pred), torch.from_numpy(image)
        image = ddim.step(pred, t, image, use_clipped_model_output=True).prev_sample.numpy()
    ours = nd.ddim_sample(run.model, run.diffusion, x.shape, 5, start=x, **run.sampling)
    np.testing.assert_allclose(ours, image, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_of_diffusers_loads(tmp_path, variant):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**{k: v for k, v in CONFIG.to_dict().items() if k != "num_train_timesteps"})
    scheduler = diffusers.DDPMScheduler(100, 0.001, 0.03, "scaled_linear", prediction_type="v_prediction")
    net = net.half() if variant else net
    diffusers.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(tmp_path, variant=variant)
    assert (tmp_path / "unet" / WEIGHTS).exists() == (variant is None)
    run, (x, t) = checkpoint.load_run(tmp_path, "ref"), picture()
    assert run.diffusion.to_dict() == nd.Diffusion(100, "scaled_linear", "v", betas=(0.001, 0.03)).to_dict()
    np.testing.assert_allclose(run.model.predict(x, t), theirs(net.float(), x, t), rtol=1e-4, atol=1e-5)
    assert run.shape == (8, 12, 1) and run.sampling["spacing"] == "leading"


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_class_embeds=5, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0),
        dict(class_embed_type="timestep", act_fn="gelu", mid_block_type=None),
        dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=2, attention_head_dim=None),
        dict(downsample_type="resnet", upsample_type="resnet", layers_per_block=2, time_embedding_dim=24),
    ],
)
def test_a_file_of_diffusers_is_written_again_with_the_same_bits(tmp_path, changes):
    diffusers = pytest.importorskip("diffusers")
    config = {k: v for k, v in CONFIG.to_dict().items() if k != "num_train_timesteps"}
    diffusers.UNet2DModel(**config | changes).save_pretrained(tmp_path / "theirs")
    UNet.from_pretrained(tmp_path / "theirs", "ref").save_pretrained(tmp_path / "ours")
    here, there = (safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert here.keys() == there.keys()
    assert not [name for name in here if here[name].tobytes() != there[name].tobytes()]
    assert [a.shape for a in here.values()] == [there[name].shape for name in here]


@pytest.mark.parametrize(
    "T, betas, zero_snr",
    [(1000, None, 0), (500, None, 0), (1000, (1e-3, 0.015), 0), (500, None, 1), (1000, None, 1)],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers_gets_the_same_alpha_bar(schedule, T, betas, zero_snr, model, tmp_path):
    """diffusers' table is float32: 1 - beta is rounded by 3e-8 and so is each of the products, in all by
    T * 6e-8 of alpha_bar. zero_snr takes roots and quotients of that, hence twice as much."""
    diffusers = pytest.importorskip("diffusers")
    if betas and schedule in ("cosine", "sigmoid"):
        betas = None
    diffusion = nd.Diffusion(T, schedule, "v", betas, zero_snr, "fixed_large")
    checkpoint.save_pretrained(model, tmp_path, diffusion)
    table = diffusers.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    assert table.config.variance_type == "fixed_large"
    np.testing.assert_allclose(table.alphas_cumprod, diffusion.alpha_bar, rtol=T * 1.2e-7, atol=2e-7)
    assert checkpoint.load_run(tmp_path, "ref").diffusion.to_dict() == diffusion.to_dict()
    table.save_pretrained(tmp_path / "scheduler")  # and by way of diffusers
    assert checkpoint.load_run(tmp_path, "ref").diffusion.to_dict() == diffusion.to_dict()


# ---- other files


def folder_with(model, folder, **changes):
    """A pipeline folder whose scheduler config has these keys changed."""
    checkpoint.save_pretrained(model, folder, nd.Diffusion(100, "linear", "v"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes, sampling, warning",
    [
        ({}, dict(clip=True, dynamic=None, spacing="trailing"), None),
        (dict(timestep_spacing="leading"), dict(spacing="leading"), None),
        (dict(clip_sample=False), dict(clip=False), None),
        (dict(clip_sample_range=2), dict(clip=2.0), None),
        (dict(thresholding=True, clip_sample=False), dict(clip=True, dynamic=None), None),  # to at most 1
        (dict(thresholding=True, sample_max_value=1.5), dict(dynamic=0.995), "sample_max_value = 1.5: nano"),
        (dict(_class_name="DDIMScheduler", set_alpha_to_one=False), {}, "set_alpha_to_one = False"),
        (dict(steps_offset=1, timestep_spacing="leading"), {}, "steps_offset = 1"),
        (dict(steps_offset=1), {}, None),  # without leading it does nothing in diffusers
        (dict(variance_type="fixed_small_log"), {}, None),
    ],
)  # fmt: skip
def test_settings_of_the_sampler_come_along(model, tmp_path, changes, sampling, warning):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = checkpoint.load_run(folder_with(model, tmp_path, **changes), "ref")
    assert run.sampling | sampling == run.sampling
    assert [warning in str(w.message) for w in said] == ([True] if warning else [])
    assert run.diffusion.variance == "fixed_small"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(_class_name="EulerDiscreteScheduler"), "_class_name = 'EulerDiscreteScheduler': must be one"),
        (dict(variance_type="learned"), "variance_type = 'learned': must be one of"),
        (dict(variance_type="learned_range"), "out_channels = 1: must be 2, two for each"),
        (dict(trained_betas=[0.1] * 100), "trained_betas = .*: must be null"),
        (dict(trained_betas=[10**19] * 100), "trained_betas = .*: must be null"),
        (dict(trained_betas="abc"), "trained_betas = 'abc': must be null"),
        (dict(beta_schedule=["linear"]), r"beta_schedule = \['linear'\]: must be one of"),
        (dict(beta_schedule="laplace"), "beta_schedule = 'laplace': must be one of"),
        (dict(prediction_type=None), "prediction_type = None: must be one of"),
        (dict(beta_end=1.5), r"betas = \(.*1.5\): must be two numbers"),
        (dict(beta_end="0.02"), "beta_end = '0.02': must be of the type of 0.02"),
        (dict(num_train_timesteps=10**12), "timesteps = 1000000000000"),
        (dict(num_train_timesteps=True), "num_train_timesteps = True"),
        (dict(clip_sample="yes"), "clip_sample = 'yes'"),
        (dict(clip_sample_range=0), "clip_sample_range = 0: must be above 0"),
        (dict(dynamic_thresholding_ratio=1.1), "dynamic_thresholding_ratio = 1.1"),
        (dict(timestep_spacing="karras"), "timestep_spacing = 'karras'"),
        (dict(rescale_betas_zero_snr=True, prediction_type="epsilon"), "prediction 'eps' with zero_snr"),
    ],
)  # fmt: skip
def test_a_scheduler_that_is_not_understood_is_refused_by_name(model, tmp_path, changes, message):
    with pytest.raises(nd.NanodiffError, match=message) as error:
        checkpoint.load_run(folder_with(model, tmp_path, **changes), "ref")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_projections_saved_as_1x1_convolutions_under_old_names(model, tmp_path):
    model.save_pretrained(tmp_path)

    def older(tensors):
        out = {}
        for name, array in tensors.items():
            for old, new in checkpoint.OLD_NAMES.items():
                if new in name and array.ndim == 2:
                    array = array[:, :, None, None]
                name = name.replace(new, old)
            out[name] = array
        assert out["mid_block.attentions.0.query.weight"].shape == (16, 16, 1, 1)
        return out

    rewrite(tmp_path, older)
    assert same_bits(UNet.from_pretrained(tmp_path, "ref"), model)
    rewrite(
        tmp_path, lambda t: t | {"mid_block.attentions.0.to_q.bias": t["mid_block.attentions.0.query.bias"]}
    )
    with pytest.raises(nd.NanodiffError, match="mid_block.attentions.0.to_q.bias' is there under two names"):
        UNet.from_pretrained(tmp_path, "ref")


def test_half_precision_file_where_it_is_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / WEIGHTS, tmp_path / checkpoint.HALF_FILE)
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(
        nd.NanodiffError, match="is not a whole safetensors file"
    ):  # the plain one comes first
        UNet.from_pretrained(tmp_path, "ref")
    (tmp_path / WEIGHTS).unlink()
    assert same_bits(UNet.from_pretrained(tmp_path, "ref"), model)


def test_a_pickle_is_refused_with_the_way_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    for load in (UNet.from_pretrained, checkpoint.load_run):
        with pytest.raises(
            nd.NanodiffError, match=r"a pickle.*from_pretrained\(folder\).save_pretrained"
        ) as error:
            load(tmp_path, "ref")
        assert "\n" not in str(error.value)
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is not there"):
        UNet.from_pretrained(tmp_path, "ref")


# ---- files that lie


def refused(folder, message):
    with pytest.raises(nd.NanodiffError, match=message) as error:
        UNet.from_pretrained(folder, "ref")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700, str(error.value)


BIG = 10**9


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(block_out_channels=[BIG, BIG]), "block_out_channels = 1000000000: must be at most 16384"),
        (dict(block_out_channels=[16384, 16384]), "2147483648: |does not fit its config.json"),
        (dict(sample_size=10**12), "sample_size = 1000000000000: must be at most 8192"),
        (dict(layers_per_block=BIG), "layers_per_block = 1000000000: must be at most 32"),
        (dict(num_class_embeds=BIG), "num_class_embeds = 1000000000: must be at most"),
        (dict(num_class_embeds=2**20), "does not fit its config.json: 'class_embedding.weight' is missing"),
        (dict(time_embedding_dim=BIG), "time_embedding_dim = 1000000000"),
        (dict(in_channels=10**18), "in_channels = 1000000000000000000"),
        (dict(block_out_channels=[8] * 10**5), "block_out_channels = .*: must be a list of at most 12"),
        (dict(block_out_channels="8, 16"), "block_out_channels = '8, 16': must be a list"),
        (dict(block_out_channels=["8", "16"]), "must be one or more integers"),
        (dict(block_out_channels={"a" * 10**5: 1}), "block_out_channels = "),
        (dict(norm_eps="1e-5"), "norm_eps = '1e-5': must be a number"),
        (dict(dropout=[]), r"dropout = \[\]: must be a number"),
        (dict(flip_sin_to_cos="false"), "flip_sin_to_cos = 'false': must be true or false"),
        (dict(_class_name="UNet2DConditionModel"), "_class_name = 'UNet2DConditionModel': must be UNet2D"),
    ],
)  # fmt: skip
def test_hostile_configs(model, tmp_path, little_memory, changes, message):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(tmp_path, message)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b"\xff\xfe{}", "not JSON: 'utf-8' codec"),
        (b'{"dropout": NaN}', "NaN is not a finite number"),
        (b'{"dropout": -Infinity}', "-Infinity is not a finite number"),
        (b'{"dropout": 1e999}', "1e999 is not a finite number"),
        (b'{"sample_size": 1' + b"0" * 10**5 + b"}", "is not a finite number of at most 40"),
        (b'{"dropout": 0, "dropout": 0.5}', "a key twice"),
        (b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 8 levels deep"),
        (b'{"a": "' + b"x" * (5 << 20) + b'"}', "longer than 4194304 bytes"),
    ],
    ids=range(11),
)
def test_hostile_json(model, tmp_path, little_memory, data, message):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    refused(tmp_path, message)


def framed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(**fields):
    return {"a": dict(dtype="F32", shape=[2], data_offsets=[0, 8]) | fields}


TWICE = json.dumps(one())[:-1].encode() + b"," + json.dumps(one())[1:].encode()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x01\x02", "it has 2 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "it has 10 bytes, and should have more than"),
        (framed(b"{" + b" " * (5 << 20) + b"}"), "its header has 5242882 bytes; at most 4194304"),
        (framed(b"[]"), "its header is not an object"),
        (framed(b" {}"), "its header is not an object"),
        (framed(b'{"a\xff": 1}'), "its header is not JSON"),
        (framed(b'{"a":' + b"[" * 10**6), "nested too deeply"),
        (framed({"__metadata__": {"a": 1}}), "its metadata is no text"),
        (framed({"a\ud800": one()["a"]}, bytes(8)), "its header is not JSON: 'utf-8' codec can't encode"),
        (framed(TWICE, bytes(8)), "a key twice"),
        (framed({"a": 1}), "'a' has other fields"),
        (framed(one(more=1), bytes(8)), "'a' has other fields"),
        (framed(one(dtype="I32"), bytes(8)), "'a' is 'I32'; must be F64, F32, F16, BF16"),
        (framed(one(dtype=["F32"]), bytes(8)), "'a' is .*; must be F64"),
        (framed(one(dtype="F64"), bytes(8)), r"'a', F64 \[2\], cannot lie at bytes \[0, 8\]"),
        (framed(one(shape=[3]), bytes(8)), "cannot lie at bytes"),
        (framed(one(shape=["2"]), bytes(8)), "no proper shape"),
        (framed(one(shape=[2.0]), bytes(8)), "no proper shape"),
        (framed(one(shape=[True, 2]), bytes(8)), "no proper shape"),
        (framed(one(shape=[-1, -2]), bytes(8)), "no proper shape"),
        (framed(one(shape=[0, 10**19], data_offsets=[0, 0])), "no proper shape"),
        (framed(one(shape=[10**9, 10**9], data_offsets=[0, 4 * 10**18]), bytes(8)), "its tensors take"),
        (framed(one(data_offsets=[8, 0]), bytes(8)), "cannot lie at bytes"),
        (framed(one(data_offsets=[0, 8, 8]), bytes(8)), "no proper shape"),
        (framed(one(data_offsets=[4, 12]), bytes(12)), "'a' starts at byte 4, where byte 0 is next"),
        (framed(one() | {"b": one()["a"]}, bytes(8)), "'b' starts at byte 0, where byte 8 is next"),
        (framed(one() | {"b": one(data_offsets=[12, 20])["a"]}, bytes(20)), "'b' starts at byte 12"),
        (framed(one(), bytes(7)), "its tensors take 8 bytes, and it has 7"),
        (framed(one(), bytes(9)), "its tensors take 8 bytes, and it has 9"),
    ],
    ids=range(29),
)  # fmt: skip
def test_hostile_headers(model, tmp_path, little_memory, data, message):
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(data)
    refused(tmp_path, message)


def test_names_and_numbers_that_cannot_be_shown_or_held(model, tmp_path):
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {"a\n": t["conv_in.bias"]})
    refused(tmp_path, r"'a\\n' is \(8,\) and should be absent")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {n: a.astype(np.float64) for n, a in t.items()})
    rewrite(tmp_path, lambda t: t["conv_in.bias"].__setitem__(0, 1e300))  # too large for float32
    refused(tmp_path, "conv_in.bias holds NaN or infinity")


def test_no_memory_before_the_file_fits(model, tmp_path, monkeypatch):
    """A network within the limits on its fields, of 10^10 weights, is compared with the file on paper."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(block_out_channels=[2**14, 2**14])))
    monkeypatch.setattr("nanodiff.params.Params.allocate", lambda *_: pytest.fail("memory was made"))
    refused(
        tmp_path,
        r"does not fit its config.json: \d{11} weights are more than 2147483648; 'conv_in.weight' is",
    )


def test_run_folders_that_lie(tmp_path, little_memory):
    """A run.json with a larger network than its checkpoint holds; arrays of other lengths in a checkpoint."""
    model = UNet(CONFIG, device="ref")
    opt = nd.Adam(model.params, ema=0.9)
    good = dict(
        settings={}, data={}, shape=[8, 12, 1], model=CONFIG.to_dict(), diffusion=nd.Diffusion().to_dict()
    )

    def write(**changes):
        (tmp_path / "run.json").write_text(json.dumps(good | changes))

    write()
    path = checkpoint.save_checkpoint(tmp_path, 1, model, opt)
    assert same_bits(checkpoint.load_run(tmp_path, "ref").model, model)
    for changes, message in (
        (dict(model=CONFIG.to_dict() | dict(block_out_channels=[2048, 2048])), "in this network"),
        (dict(model=CONFIG.to_dict() | dict(block_out_channels=[BIG, BIG])), "run.json: block_out_channels"),
        (dict(shape=[10**9, 8, 1]), "run.json: shape = .*: must be H, W, C"),
        (dict(shape="8x8"), "without 'shape', list"),
        (dict(settings=[]), "without 'settings', dict"),
        (dict(diffusion=dict(schedule=["cosine"])), "run.json: schedule"),
        (dict(diffusion=dict(timesteps=10**12)), "run.json: timesteps"),
        (dict(diffusion=dict(betas=[0.1, "0.2"], schedule="linear")), "run.json: betas"),
    ):
        write(**changes)
        with pytest.raises(nd.NanodiffError, match=message):
            checkpoint.load_run(tmp_path, "ref")
    write()
    tensors, meta = checkpoint.read_checkpoint(path).tensors, checkpoint.read_checkpoint(path).meta
    for name, part in (("ema", tensors["ema"][:1]), ("state", np.zeros(1))):  # would broadcast
        lying = dict(tensors, **{name: np.ascontiguousarray(part)})
        digests = {n: checkpoint._digest(a) for n, a in lying.items()}
        body = json.dumps(meta | dict(sha256=digests))
        digest = checkpoint.hashlib.sha256(body.encode()).hexdigest()
        path.write_bytes(safetensors.numpy.save(lying, {"nanodiff": body, "sha256": digest}))
        with pytest.raises(nd.NanodiffError, match=rf"{name} is \(1,\), in this network \("):
            checkpoint.restore(checkpoint.read_checkpoint(path), model, opt, ema=name == "ema")


def test_the_largest_network_that_is_allowed_has_a_header_that_is_read():
    big, attn = checkpoint.LARGEST, checkpoint.LEVELS
    config = nd.UNetConfig(
        block_out_channels=[2**14] * attn, layers_per_block=big["layers_per_block"], attention_head_dim=None,
        down_block_types=["AttnDownBlock2D"] * attn, up_block_types=["AttnUpBlock2D"] * attn,
    )  # fmt: skip
    params = UNet(config, "ref", init=None).params
    header = {n: dict(dtype="F32", shape=params[n].shape, data_offsets=[10**15] * 2) for n in params}
    assert len(json.dumps(header)) < checkpoint.JSON_BYTES
    assert len(json.dumps(checkpoint._layout(params))) < checkpoint.JSON_BYTES / 2


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    model = UNet(CONFIG, device="ref")
    with pytest.raises(
        nd.NanodiffError, match="step 1: .* bytes beside the weights: use a smaller --log-every"
    ):
        checkpoint.save_checkpoint(tmp_path, 1, model, nd.Adam(model.params), window=[0.123456789] * 300_000)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_what_the_library_reads_is_read_alike(model, tmp_path):
    model.save_pretrained(tmp_path)
    entries, metadata = checkpoint.read_header(tmp_path / WEIGHTS)
    known = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    assert metadata == {"format": "pt"} and entries.keys() == known.keys()
    for name, entry in entries.items():
        assert np.array_equal(checkpoint.read_tensor(tmp_path / WEIGHTS, entry), known[name])
    assert re.fullmatch(r"\d+", str(entry.start))
