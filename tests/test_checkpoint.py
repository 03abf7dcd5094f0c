"""Checkpoints survive kills, failing calls and damage; diffusers' layout goes out and comes back."""

import builtins
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

from nanodiff import NanodiffError, checkpoint

ROOT = Path(__file__).parents[1]
PLAIN = SimpleNamespace(
    to_host=np.asarray, to_device=lambda array, dtype=None: np.asarray(array, dtype), copy=np.copyto
)


class Params(dict):
    """Two tensors of n / 2 floats in one flat array."""

    def __init__(self, n):
        self.data = np.zeros(n, np.float32)
        self["a.weight"] = SimpleNamespace(shape=(n // 2,), start=0)
        self["b.weight"] = SimpleNamespace(shape=(n // 2,), start=n // 2)


def stand_in(n=64, value=0):
    """A model and an optimiser, all of whose numbers are `value`."""
    model = SimpleNamespace(params=Params(n), ctx=PLAIN)
    opt = SimpleNamespace(m=np.zeros(n), v=np.zeros(n), ema=np.zeros(n), state=np.zeros(4))
    for array in (model.params.data, opt.m, opt.v, opt.ema, opt.state):
        array[...] = value
    return model, opt


def save(folder, step, n=64):
    return checkpoint.save_checkpoint(folder, step, *stand_in(n, step), window=[0.1, 0.25], seconds=1.5)


def is_whole(saved):
    """Every number in it is the one that was saved under its step."""
    return len(saved.tensors) == 5 and all((array == saved.step).all() for array in saved.tensors.values())


def save_until_killed(folder):
    with checkpoint.claim(folder):
        assert not leftovers(folder), "the temporary file of a killed save is still there"
        saved = checkpoint.load_checkpoint(folder, aside=True)
        step = saved.step if saved else 0
        print(step, flush=True)
        while True:
            step += 1
            save(folder, step, 20_000)


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if "tmp" in path.name]


@pytest.mark.filterwarnings("error")  # a damaged checkpoint would be a warning
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    chance, killed, in_a_save = random.Random(1), 0, 0
    folders, last = [tmp_path / str(i) for i in range(4)], [0] * 4
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    for _ in range(10):
        children = [subprocess.Popen([sys.executable, __file__, str(f)], **pipes) for f in folders]
        try:
            starts = [child.stdout.readline() for child in children]
        finally:
            for child in children:
                time.sleep(chance.uniform(0, 0.03))
                child.kill()
        for i, child in enumerate(children):
            more = child.communicate()[0]
            assert starts[i].strip().isdigit(), (starts[i] + more).decode()
            assert int(starts[i]) >= last[i], "a restart went back behind a checkpoint that had been seen"
            killed += child.returncode == -9
            in_a_save += bool(leftovers(folders[i]))
            saved = checkpoint.load_checkpoint(folders[i])
            if saved is not None:
                assert is_whole(saved)
                last[i] = saved.step
    assert killed == 40 and min(last) > 0
    assert in_a_save, "no kill hit a save: the test tests nothing"
    for folder in folders:
        with checkpoint.claim(folder):
            assert not leftovers(folder)


def test_every_failing_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    calls = {"count": 0, "fail": None}

    def faulty(function):
        def call(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] == calls["fail"]:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    class File:
        """An open file whose write and flush fail like the other calls."""

        def __init__(self, *args):
            self.file = builtins.open(*args)
            self.write, self.flush = faulty(self.file.write), faulty(self.file.flush)
            self.read, self.fileno = self.file.read, self.file.fileno

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    for step in (1, 2):
        save(tmp_path, step)
    for name in ("fsync", "replace", "open", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, faulty(getattr(os, name)))
    monkeypatch.setattr(checkpoint, "open", faulty(File), raising=False)

    before = 2
    for k in range(1, 100):
        calls.update(count=0, fail=k)
        try:
            save(tmp_path, 2 + k)
        except OSError as error:
            assert "No space left" in str(error)
        reached, calls["fail"] = calls["count"] >= k, None
        saved = checkpoint.load_checkpoint(tmp_path)
        assert is_whole(saved) and saved.step in (before, 2 + k)
        assert not leftovers(tmp_path)
        before = saved.step
        if not reached:
            break
    assert not reached and k > 7


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 30, 400):
        save(tmp_path, step)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000030.safetensors", "step-00000400.safetensors"]


def test_round_trip_of_the_rest(tmp_path):
    save(tmp_path, 7)
    saved = checkpoint.load_checkpoint(tmp_path)
    assert (saved.step, saved.meta["window"], saved.meta["seconds"]) == (7, [0.1, 0.25], 1.5)
    assert checkpoint.load_checkpoint(tmp_path / "nothing") is None


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    good = save(tmp_path, 3).read_bytes()
    bad, chance = tmp_path / "bad.safetensors", random.Random(2)
    header = 8 + int.from_bytes(good[:8], "little")
    places = [chance.randrange(header) for _ in range(150)] + [
        chance.randrange(header, len(good)) for _ in range(150)
    ]
    for place in places:
        data = bytearray(good)
        data[place] ^= 1 << chance.randrange(8)
        bad.write_bytes(data)
        with pytest.raises(NanodiffError, match="bad.safetensors"):
            checkpoint.read_checkpoint(bad)
    for length in [0, 1, 7, 8, *range(9, len(good), 61), len(good) - 1]:
        bad.write_bytes(good[:length])
        with pytest.raises(NanodiffError, match="bad.safetensors"):
            checkpoint.read_checkpoint(bad)
    bad.write_bytes(good + b"x")
    with pytest.raises(NanodiffError, match="bad.safetensors"):
        checkpoint.read_checkpoint(bad)
    bad.write_bytes(good)
    assert is_whole(checkpoint.read_checkpoint(bad))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    newer.write_bytes(newer.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"step-00000002.* is not a whole .*using step-00000001"):
        saved = checkpoint.load_checkpoint(tmp_path)
    assert saved.step == 1 and is_whole(saved) and newer.exists()
    with pytest.warns(UserWarning):
        checkpoint.load_checkpoint(tmp_path, aside=True)
    assert not newer.exists() and newer.with_suffix(".damaged").exists()
    older.write_bytes(b"")
    with pytest.raises(NanodiffError, match="no readable checkpoint.*step-00000001"):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["weights", "m", "v", "ema"])
def test_what_is_not_finite_is_never_written(tmp_path, name):
    before = save(tmp_path, 1).read_bytes()
    model, opt = stand_in()
    array = model.params.data if name == "weights" else getattr(opt, name)
    array[5] = np.inf if name == "m" else np.nan
    with pytest.raises(NanodiffError, match=f"step 2: NaN or infinity in {name}"):
        checkpoint.save_checkpoint(tmp_path, 2, model, opt)
    assert [path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()] == [before]


def test_another_layout_is_refused_by_name(tmp_path):
    save(tmp_path, 1, 64)
    saved = checkpoint.load_checkpoint(tmp_path)
    model, opt = stand_in(128)
    with pytest.raises(NanodiffError, match=r"a.weight' is \[\[32\], 0\], in this network \[\[64\], 0\]"):
        checkpoint.restore(saved, model, opt)
    model, opt = stand_in(64)
    checkpoint.restore(saved, model, opt)
    assert (model.params.data == 1).all() and (opt.state == 1).all()


def test_a_folder_is_held_by_one_training(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with checkpoint.claim(tmp_path / "run"):
        with pytest.raises(NanodiffError, match="is being trained by another process"):
            with checkpoint.claim(tmp_path / "run"):
                pass
    with checkpoint.claim(tmp_path / "run"):  # and then it is free
        pass
    with open(tmp_path / "run" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_locks_a_folder_is_still_claimed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with checkpoint.claim(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_stats_stop_at_a_step_and_at_a_torn_line(tmp_path):
    (tmp_path / "stats.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"st')
    assert [r["step"] for r in checkpoint.read_stats(tmp_path, 20)] == [10, 20]
    assert [r["step"] for r in checkpoint.read_stats(tmp_path)] == [10, 20, 30]


# ---- diffusers' layout


@pytest.fixture(scope="module")
def model():
    from nanodiff import UNet, UNetConfig

    config = UNetConfig(
        sample_size=(8, 12), in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return UNet(config, device="ref", seed=1, init="torch")


def same_weights(a, b):
    return [n for n in a.params] == [n for n in b.params] and all(
        np.array_equal(a.params[n].data, b.params[n].data) for n in a.params
    )


def test_diffusers_layout_comes_back(model, tmp_path):
    from nanodiff import Diffusion, UNet

    model.save_pretrained(tmp_path / "bare")
    back = UNet.from_pretrained(tmp_path / "bare", device="ref")
    assert back.config == model.config and same_weights(back, model)
    checkpoint.save_pretrained(model, tmp_path / "pipe", Diffusion(100, "linear", "v"))
    run = checkpoint.load_run(tmp_path / "pipe", device="ref")
    assert same_weights(run.model, model) and run.shape == (8, 12, 1) and run.step is None
    assert run.diffusion.to_dict() == Diffusion(100, "linear", "v").to_dict()
    with pytest.warns(UserWarning, match="no scheduler"):
        assert checkpoint.load_run(tmp_path / "bare", device="ref").diffusion.schedule == "linear"


@pytest.mark.parametrize("dtype, unit", [("F16", 2**-10), ("BF16", 2**-7), ("F64", 0)])
def test_other_dtypes_are_read(model, tmp_path, dtype, unit):
    """The relative error is below a unit in the last place of the narrower type (bfloat16 is cut off)."""
    model.save_pretrained(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS_FILE
    header, data = {}, b""
    for name, array in safetensors.numpy.load(path.read_bytes()).items():
        part = array.view(np.uint32) >> 16 if dtype == "BF16" else array
        part = part.astype({"F16": "<f2", "BF16": "<u2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = dict(dtype=dtype, shape=array.shape, data_offsets=[len(data), len(data) + len(part)])
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    back = checkpoint.from_pretrained(tmp_path, "ref")
    for name in model.params:
        np.testing.assert_allclose(
            back.params[name].data, model.params[name].data, rtol=2 * unit, atol=unit / 2**14
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("conv_in.bias"), "conv_in.bias' is missing and should be"),
        (lambda t: t.update({"more": np.zeros(3, np.float32)}), r"more' is \(3,\) and should be absent"),
        (
            lambda t: t.update({"conv_in.bias": np.zeros(9, np.float32)}),
            r"conv_in.bias' is \(9,\) and should be \(8,\)",
        ),
        (lambda t: t.update({"conv_in.bias": np.zeros(8, np.int32)}), "conv_in.bias' is 'I32'; must be F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS_FILE
    tensors = safetensors.numpy.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))
    with pytest.raises(NanodiffError, match=message):
        checkpoint.from_pretrained(tmp_path, "ref")


def test_names_from_before_diffusers_0_17_are_known(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / checkpoint.WEIGHTS_FILE
    tensors = safetensors.numpy.load(path.read_bytes())
    for old, new in checkpoint.OLD_NAMES.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    assert "mid_block.attentions.0.query.weight" in tensors
    path.write_bytes(safetensors.numpy.save(tensors))
    assert same_weights(checkpoint.from_pretrained(tmp_path, "ref"), model)


def test_diffusers_reads_what_is_written(model, tmp_path):
    """The same weights and picture give the same prediction, up to float32 rounding over about 20 layers."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    from nanodiff import Diffusion

    diffusion = Diffusion(50, "cosine", "eps")
    checkpoint.save_pretrained(model, tmp_path, diffusion)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == [
        "diffusers",
        "DDPMScheduler",
    ]
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet")
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 1)).astype(np.float32)
    t = np.array([3, 40])
    with torch.no_grad():
        out = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy()
    np.testing.assert_allclose(model.predict(x, t), out.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    # diffusers' table is float32, and its product of 50 factors rounds as often
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), diffusion.alpha_bar, rtol=1e-4, atol=1e-8)


if __name__ == "__main__":
    save_until_killed(sys.argv[1])
