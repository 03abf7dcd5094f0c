"""The training loop: the same bits after any break, no bad step kept, nothing of a user's overwritten."""

import functools
import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import nanodiff as nd
from nanodiff import checkpoint, data, train
from nanodiff.train import TrainSettings, unet_config

STEPS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (21, 8, 8, 1), dtype=np.uint8))
    return str(path)


def tiny(source, folder, **changes):
    """Settings of a small run; every feature that draws numbers or keeps a state is on."""
    settings = dict(
        data=source, out=str(folder), steps=STEPS, batch=4, lr=1e-3, warmup=5, clip=0.5, ema=0.9, seed=3,
        decay="constant", prediction="eps",
        device="ref", flip=True, channels=(8, 16), layers=1, attention=1, dropout=0.1, timesteps=10,
        log_every=3, sample_every=100, save_every=5, samples=2,
    )  # fmt: skip
    return TrainSettings(**{**settings, **changes})


@pytest.fixture
def make(source, tmp_path):
    return lambda out="run", **changes: tiny(source, tmp_path / out, **changes)


def state(folder):
    """Digests of all tensors of the last checkpoint, and what of stats.jsonl does not depend on the clock."""
    saved = checkpoint.load_checkpoint(folder)
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in saved.tensors.items()}
    keys = ("step", "loss", "lr", "grad_norm", "skipped")
    return saved.step, digests, [{key: r[key] for key in keys} for r in checkpoint.read_stats(folder)]


def files(folder):
    """Names, contents and times of everything in a folder."""
    paths = sorted(Path(folder).rglob("*"))
    return [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths]


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """What the run of `make()` is when nothing stops it."""
    folder = train.train(tiny(source, tmp_path_factory.mktemp("unbroken") / "run"))
    return folder, state(folder)


def test_a_run_leaves_all_it_promises(unbroken):
    folder, (step, digests, stats) = unbroken
    for name in ("run.json", "samples.png", "steps.gif", "loss.png"):
        assert (folder / name).stat().st_size > 0
    assert step == STEPS and set(digests) == {"weights", "ema", "m", "v", "state"}
    assert [r["step"] for r in stats] == [3, 6, 9, 12] and all(0 < r["loss"] < 10 for r in stats)
    assert [r["lr"] for r in stats] == pytest.approx([6e-4, 1e-3, 1e-3, 1e-3])
    run = json.loads((folder / "run.json").read_text())
    assert run["finished"] == STEPS and run["shape"] == [8, 8, 1] and run["data"]["images"] == 21
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000010.safetensors", "step-00000012.safetensors"]


OPTIONS = {
    "learned": dict(variance="learned_range", prediction="eps"),
    "weighted": dict(min_snr=5.0, offset_noise=0.1, zero_snr=True, prediction="v"),
    "told": dict(labels=True, label_drop=0.5, schedule="sigmoid"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_resume_and_sample(tmp_path, name):
    """Also with a break: the same bits."""
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.npz"
    np.savez(path, images=rng.integers(0, 256, (21, 8, 8, 1), dtype=np.uint8), labels=np.arange(21) % 3)
    whole = train.train(tiny(str(path), tmp_path / "whole", **OPTIONS[name]))
    train.train(tiny(str(path), tmp_path / "broken", steps=5, **OPTIONS[name]))
    again = train.train(tiny(str(path), tmp_path / "broken", **OPTIONS[name]))
    assert state(again) == state(whole)
    plain = train.train(tiny(str(path), tmp_path / "plain"))
    assert state(whole)[1]["weights"] != state(plain)[1]["weights"]
    run = checkpoint.load_run(whole, "ref")
    config = run.model.config
    assert config.out_channels == (2 if name == "learned" else 1)
    assert config.num_class_embeds == (4 if name == "told" else None)  # three classes and "none"
    assert (run.diffusion.variance == "learned_range") == (name == "learned")
    assert run.diffusion.zero_snr == (name == "weighted")
    for sampler in ("ddpm", "ddim", "dpm"):
        extra = dict(guidance=2.0) if name == "told" else {}
        x = train.sample_images(run.model, run.diffusion, run.shape, 4, sampler, steps=4,
                                classes=3 if name == "told" else None, **extra)  # fmt: skip
        assert x.shape == (4, 8, 8, 1) and np.isfinite(x).all()


def test_a_run_from_before_a_setting_existed_goes_on(make):
    """Its run.json does not name it: it had the default."""
    folder = train.train(make(steps=5))
    run = json.loads((folder / "run.json").read_text())
    for name in ("zero_snr", "variance", "min_snr", "offset_noise", "label_drop"):
        del run["settings"][name]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(nd.NanodiffError, match="offset_noise = 0.0, not 0.1"):
        train.train(make(offset_noise=0.1))
    assert state(train.train(make()))[0] == STEPS


def small_step(seed=0, classes=None, diff=None, **options):
    """The loss and the gradient of one training step of a small network on random images."""
    config = nd.UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                           num_class_embeds=classes)  # fmt: skip
    model = nd.UNet(config, device="ref", init="torch")
    x0 = np.random.default_rng(seed).uniform(-1, 1, (6, 8, 8, 1)).astype(np.float32)
    labels = np.arange(6) % 3 if classes else None
    diff = diff or nd.Diffusion(100, prediction="v")
    loss = nd.train_step(model, nd.Adam(model.params), diff, x0, labels, key=(1, 2), **options)
    return loss, model.params.grad.copy()


def test_min_snr_weighs_each_sample():
    """At gamma so large that it never caps, the loss of v is that of x0: v's error is x0's times SNR + 1."""
    loss, _ = small_step()
    weighted, _ = small_step(min_snr=5.0)
    assert 0 < weighted < loss
    diff = nd.Diffusion(100, prediction="v")
    assert (diff.loss_weight(np.arange(100), 1e9) <= 1).all()


def test_offset_noise_moves_whole_channels(monkeypatch):
    seen = []
    real = nd.UNet.loss_and_grad

    def spy(self, x, t, target, labels=None, *more):
        seen.append((x.copy(), labels))
        return real(self, x, t, target, labels, *more)

    monkeypatch.setattr(nd.UNet, "loss_and_grad", spy)
    small_step()
    small_step(offset_noise=0.3)
    moved = seen[1][0] - seen[0][0]
    assert np.ptp(moved, axis=(1, 2)).max() < 1e-6 and np.abs(moved).max() > 0.05
    small_step(classes=4, label_drop=0.5)
    small_step(classes=4)
    dropped = seen[2][1] == 3
    assert (seen[3][1] == np.arange(6) % 3).all() and 0 < dropped.sum() < 6
    assert (seen[2][1][~dropped] == seen[3][1][~dropped]).all()


def test_guidance_and_dropped_labels_need_a_table_of_classes():
    with pytest.raises(nd.NanodiffError, match="label_drop"):
        small_step(label_drop=0.5)
    model = nd.UNet(nd.UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
                                  down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                                  class_embed_type="timestep"), device="ref")  # fmt: skip
    with pytest.raises(nd.NanodiffError, match="guidance"):
        nd.ddim_sample(model, nd.Diffusion(10), (2, 8, 8, 1), 2, labels=np.zeros(2, int), guidance=2.0)


def test_settings_that_contradict_each_other(make, source):
    for changes, says in (
        (dict(label_drop=0.1), "label_drop"),
        (dict(variance="learned_range", min_snr=5.0), "min_snr"),
        (dict(zero_snr=True), "zero_snr"),
        (dict(min_snr=0.0), "min_snr"),
    ):
        with pytest.raises(nd.NanodiffError, match=says):
            train.train(make("no", **changes))
        assert not (Path(source).parent / "no").exists()


@pytest.mark.parametrize("cut", [1, 4, 7, 9])
def test_extended_runs_are_the_same_bits(make, unbroken, cut):
    train.train(make(steps=cut))
    assert state(train.train(make())) == unbroken[1]


def test_twice_interrupted_runs_are_the_same_bits(make, unbroken, monkeypatch):
    real, crash = train.train_step, {6, 11}  # steps: the checkpoints are those of 5 and 10

    def step(*args, key, **kwargs):
        if key[1] in crash:
            crash.remove(key[1])
            raise RuntimeError("power cut")
        return real(*args, key=key, **kwargs)

    monkeypatch.setattr(train, "train_step", step)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(make())
    assert state(train.train(make())) == unbroken[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(make, unbroken, monkeypatch, capsys, number):
    real, handlers = train.train_step, (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))

    def step(*args, key, **kwargs):
        if key[1] == 6:
            os.kill(os.getpid(), number)
        return real(*args, key=key, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step)
        folder = train.train(make())
    assert "stopped at step 7 of 12" in capsys.readouterr().out
    assert checkpoint.load_checkpoint(folder).step == 7 and not (folder / "samples.png").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert state(train.train(make())) == unbroken[1]


def test_a_finished_run_says_so_and_changes_nothing(unbroken, make, capsys):
    folder, _ = unbroken
    before = files(folder)
    for steps in (STEPS, 5):
        train.train(make(out=folder, steps=steps))
        assert f"is finished: it has {STEPS} steps" in capsys.readouterr().out
    assert files(folder) == before


def test_pictures_missing_at_the_end_are_drawn_by_the_next_start(make, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("killed while drawing")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train, "sample_images", broken)
        train.train(make(steps=2))
    folder = train.train(make(steps=2))
    assert (folder / "samples.png").exists() and checkpoint.load_checkpoint(folder).step == 2


@pytest.mark.parametrize(
    "name, value, texts",
    [
        ("lr", 0.5, ["lr = 0.001", "0.5"]),
        ("batch", 5, ["batch = 4", "5"]),
        ("seed", 4, ["seed = 3", "4"]),
        ("warmup", 6, ["warmup = 5", "6"]),
        ("clip", 1.0, ["clip = 0.5", "1.0"]),
        ("ema", 0.5, ["ema = 0.9", "0.5"]),
        ("flip", False, ["flip = True", "False"]),
        ("channels", (8, 8), ["channels = [8, 16]", "[8, 8]"]),
        ("layers", 2, ["layers = 1", "2"]),
        ("attention", 0, ["attention = 1", "0"]),
        ("dropout", 0.0, ["dropout = 0.1", "0.0"]),
        ("schedule", "linear", ["schedule = 'cosine'", "'linear'"]),
        ("prediction", "v", ["prediction = 'eps'", "'v'"]),
        ("timesteps", 30, ["timesteps = 10", "30"]),
        ("size", (16, 8), ["size = None", "[16, 8]"]),
        ("decay", "cosine", ["decay = 'constant'", "'cosine'"]),
    ],
)
def test_another_value_of_what_shapes_the_run_is_refused(unbroken, make, name, value, texts):
    folder, _ = unbroken
    before = files(folder)
    changes = {"timesteps": 30, name: value} if name == "schedule" else {name: value}
    with pytest.raises(nd.NanodiffError) as error:
        train.train(make(out=folder, **changes))
    if name != "schedule":  # whose linear kind needs other timesteps too, named just as well
        assert all(
            text in str(error.value) for text in [*texts, "give the old value or choose another --out"]
        )
    assert files(folder) == before


def test_other_data_is_refused_and_the_same_under_another_name_is_not(
    unbroken, make, source, tmp_path, capsys
):
    folder, _ = unbroken
    images = np.load(source)["images"]
    same, other = tmp_path / "noise" / "noise.npz", tmp_path / "other" / "noise.npz"
    for path in (same, other):
        path.parent.mkdir()
        np.savez(path, images=images if path == same else 255 - images)
    with pytest.raises(nd.NanodiffError, match="data sha256 = "):
        train.train(make(out=folder, data=str(other)))
    train.train(make(out=folder, data=str(same), samples=5, save_every=7, log_every=1))
    assert "is finished" in capsys.readouterr().out


def test_cosine_decay_fixes_the_steps(make):
    folder = train.train(make(decay="cosine", steps=4))
    last = checkpoint.read_stats(folder)[-1]
    assert last["lr"] < 1e-3
    with pytest.raises(nd.NanodiffError, match="steps = 4, not 8"):
        train.train(make(decay="cosine", steps=8))


def test_a_folder_of_other_things_is_refused(make, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(nd.NanodiffError, match="holds other files and no run.json"):
        train.train(make(out="photos"))
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_run_that_is_being_trained_is_refused(make, tmp_path):
    pytest.importorskip("fcntl")
    with checkpoint.claim(tmp_path / "run"):
        with pytest.raises(nd.NanodiffError, match="is being trained"):
            train.train(make())
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    "changes", [dict(channels=(8, 16, 16, 16, 16)), dict(channels=(6, 12)), dict(device="gpu")]
)
def test_a_refused_command_makes_no_folder(make, tmp_path, changes):
    with pytest.raises(nd.NanodiffError):
        train.train(make(**changes))
    assert not (tmp_path / "run").exists()


def spoil(monkeypatch, steps):
    """Images of the given steps become NaN."""
    real, calls = data.to_float, iter(range(10**6))

    def to_float(images):
        return real(images) * np.float32(np.nan if next(calls) in steps else 1)

    monkeypatch.setattr(data, "to_float", to_float)


def test_one_bad_step_is_skipped_and_counted(make, monkeypatch):
    spoil(monkeypatch, {4})
    folder = train.train(make())
    saved, stats = checkpoint.load_checkpoint(folder), checkpoint.read_stats(folder)
    assert [r["skipped"] for r in stats] == [0, 1, 1, 1] and saved.tensors["state"][2:].tolist() == [11, 1]
    assert all(np.isfinite(r["loss"]) for r in stats)


def test_bad_steps_in_a_row_end_the_run_and_never_reach_a_checkpoint(make, monkeypatch, tmp_path):
    spoil(monkeypatch, range(7, 100))
    with pytest.raises(nd.NanodiffError, match=r"steps 8 to 12 had no finite loss.*--lr"):
        train.train(make(steps=40))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        tensors = checkpoint.read_checkpoint(path).tensors
        assert all(np.isfinite(tensors[name]).all() for name in ("weights", "ema", "m", "v"))


def test_weights_that_are_not_finite_are_never_saved(make, monkeypatch, tmp_path):
    real = train.train_step

    def step(model, *args, key, **kwargs):
        loss = real(model, *args, key=key, **kwargs)
        if key[1] == 9:
            model.params.data[0] = np.inf
        return loss

    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(nd.NanodiffError, match="step 10: NaN or infinity in weights"):
        train.train(make())
    assert checkpoint.load_checkpoint(tmp_path / "run").step == 5


def test_lines_of_steps_that_were_lost_are_dropped(make, unbroken, monkeypatch):
    folder = train.train(make(steps=7))
    with open(folder / "stats.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 5.0}\n{"step": 12, "lo')
    assert state(train.train(make())) == unbroken[1]


def test_previews_show_raw_and_averaged_weights_side_by_side(make):
    from PIL import Image

    both = train.train(make(out="both", steps=2, sample_every=2))
    raw = train.train(make(out="raw", steps=2, sample_every=2, ema=0))
    sizes = [Image.open(folder / "samples" / "000002.png").size for folder in (both, raw)]
    assert sizes[0] == (2 * sizes[1][0], sizes[1][1])
    assert "ema" not in checkpoint.load_checkpoint(raw).tensors


def test_load_run_gives_the_network_that_was_trained(unbroken):
    folder, _ = unbroken
    tensors = checkpoint.load_checkpoint(folder).tensors
    run, raw = (checkpoint.load_run(folder, "ref", ema=ema) for ema in (True, False))
    assert np.array_equal(run.model.params.data, tensors["ema"])
    assert np.array_equal(raw.model.params.data, tensors["weights"])
    assert run.shape == (8, 8, 1) and run.step == STEPS and run.settings["lr"] == 1e-3
    assert run.diffusion.to_dict() == nd.Diffusion(10, "cosine", "eps").to_dict()


def test_images_do_not_depend_on_the_batch(unbroken):
    run = checkpoint.load_run(unbroken[0], "cpu")
    one, three = (
        train.sample_images(run.model, run.diffusion, run.shape, 5, "ddpm", batch, steps=4, seed=9)
        for batch in (1, 3)
    )
    assert np.array_equal(one, three)


def test_the_fast_kernels_resume_too(make):
    whole = state(train.train(make(out="whole", device="cpu")))
    train.train(make(device="cpu", steps=7))
    assert state(train.train(make(device="cpu"))) == whole


def test_a_step_is_decided_by_its_key(source):
    images = data.to_float(data.load_data(source).images[:4])

    def loss(key):
        model = nd.UNet(
            unet_config(TrainSettings(channels=(8, 16), layers=1, attention=1), 8, 8, 1), device="ref"
        )
        opt = nd.Adam(model.params, lr=1e-3)
        losses = [nd.train_step(model, opt, nd.Diffusion(), images, key=key) for _ in range(2)]
        assert losses[1] < losses[0], "the same step again, and the weights did not improve on it"
        assert opt.state[2] == 2
        return losses

    assert loss((0, 1)) == loss((0, 1)) and loss((0, 1)) != loss((0, 2)) != loss((1, 2))


def test_settings_are_normalised():
    s = TrainSettings(size="28x20", channels="8,16")
    assert s.size == (28, 20) and s.channels == (8, 16)
    assert TrainSettings(size=28).size == TrainSettings(size="28").size == (28, 28)
    assert TrainSettings().for_data("mnist").steps == train.PRESETS["mnist"]["steps"]
    assert TrainSettings(steps=7).for_data("never seen").steps == 7
    open_ones = [s.for_data(name) for name in train.PRESETS]
    assert all(getattr(chosen, key) is not None for chosen in open_ones for key in train.PRESETS["other"])


def test_a_network_that_is_told_the_classes(tmp_path):
    """Two classes, black and white: samples of one label and of all in turn, resumed with the same bits."""
    images = np.repeat(np.array([0, 255], np.uint8), 8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, labels=np.repeat([0, 1], 8))
    settings = dict(
        labels=True,
        channels=(32,),
        attention=0,
        dropout=0.0,
        flip=False,
        steps=120,
        batch=8,
        lr=1e-2,
        prediction="v",
    )
    whole = train.train(tiny(str(tmp_path / "two.npz"), tmp_path / "whole", **settings))
    train.train(tiny(str(tmp_path / "two.npz"), tmp_path / "parts", **settings | dict(steps=40)))
    parts = train.train(tiny(str(tmp_path / "two.npz"), tmp_path / "parts", **settings))
    assert state(whole) == state(parts)

    run = checkpoint.load_run(whole, "ref")
    assert run.model.config.num_class_embeds == 2
    draw = functools.partial(train.sample_images, run.model, run.diffusion, run.shape, 4, seed=1, steps=10)
    black, white, turns = draw(label=0), draw(label=1), draw()
    assert black.mean() < -0.5 and white.mean() > 0.5
    assert np.array_equal(turns[::2], black[::2]) and np.array_equal(turns[1::2], white[1::2])
    with pytest.raises(nd.NanodiffError, match="label = 2: must be from 0 to 1"):
        draw(label=2)


def test_labels_that_are_not_there(make, source):
    with pytest.raises(nd.NanodiffError, match="labels = True: .* has no labels"):
        train.train(make(labels=True))
    run = checkpoint.load_run(train.train(make(steps=5)), "ref")
    with pytest.raises(nd.NanodiffError, match="label = 0: must be left out"):
        train.sample_images(run.model, run.diffusion, run.shape, 1, label=0)
