"""The command line and the examples; and what every wrong call is answered with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nanodiff as nd
from nanodiff import checkpoint
from nanodiff.__main__ import main
from nanodiff.train import TrainSettings, sample_images, train

ROOT = Path(__file__).parents[1]
TINY = "--device ref --steps 2 --batch 2 --channels 8,16 --layers 1 --timesteps 6 --samples 2".split()


def python(*args, **more):
    """Run Python on the package in this repository, wherever the tests are started."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, **more)


def noise(path, channels=1):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, channels), dtype=np.uint8)
    np.savez(path, images=images)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["train", "--data", noise(folder / "noise.npz"), "--out", str(folder / "run"), *TINY]) == 0
    return folder / "run"


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("args", [["--help"], *([c, "--help"] for c in ("train", "sample", "eval", "info"))])
def test_help_imports_nothing_heavy(args):
    code = """import sys; from nanodiff.__main__ import main
try: main(sys.argv[1:])
except SystemExit as e: print('EXIT', e.code, [m for m in ('numpy', 'numba', 'PIL') if m in sys.modules])
"""
    result = python("-c", code, *args)
    assert "usage: nanodiff" in result.stdout and result.stdout.endswith("EXIT 0 []\n"), result.stderr


def test_every_setting_is_a_flag_with_help():
    text = python("-m", "nanodiff", "train", "--help").stdout
    for name in TrainSettings.__dataclass_fields__:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name


def test_train_resumes_and_says_when_it_is_finished(run, capsys):
    before = contents(run)
    assert main(["train", "--data", str(run.parent / "noise.npz"), "--out", str(run), *TINY]) == 0
    assert "is finished: it has 2 steps" in capsys.readouterr().out
    assert contents(run) == before


def test_the_default_folder_is_named_after_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", noise("some.npz"), *TINY]) == 0
    assert (tmp_path / "runs" / "some" / "samples.png").exists()


def test_sample_writes_a_grid_and_a_gif(run, tmp_path, capsys):
    from PIL import Image

    out, gif = tmp_path / "grid.png", tmp_path / "steps.gif"
    common = ["sample", str(run), "--device", "ref", "--steps", "3", "--out", str(out)]
    assert main([*common, "--count", "4", "--gif", str(gif)]) == 0
    assert "4 images" in capsys.readouterr().out
    assert Image.open(gif).n_frames == 3
    first = np.asarray(Image.open(out))
    for more in (["--raw"], ["--seed", "1"], ["--sampler", "ddpm"], ["--eta", "1"]):
        assert main([*common, "--count", "4", *more]) == 0
        assert not np.array_equal(np.asarray(Image.open(out)), first), more


def test_sample_takes_every_option_of_its_samplers(run, tmp_path, capsys):
    out = tmp_path / "grid.png"
    common = ["sample", str(run), "--device", "ref", "--steps", "3", "--count", "2", "--out", str(out)]
    for more in (
        ["--sampler", "dpm"], ["--spacing", "linspace"], ["--eta", "1", "--eta-stop", "2"], ["--no-clip"],
        ["--eta", "1", "--noise-stop", "2"], ["--dynamic", "0.9"],
    ):  # fmt: skip
        assert main([*common, *more]) == 0, more
    for more, says in (
        (["--sampler", "ddpm", "--noise-stop", "2"], "--noise-stop 2 is for --sampler ddim"),
        (["--spacing", "even"], "'even'"),
        (["--guidance", "2"], "guidance"),
        (["--dynamic", "2"], "dynamic = 2.0"),
    ):
        capsys.readouterr()
        assert main([*common, *more]) == 2 and says in capsys.readouterr().err


def test_eval_prints_bits_per_dimension(run, tmp_path, capsys):
    common = ["eval", str(run), "--device", "ref", "--count", "4", "--times", "3"]
    assert main(common) == 0
    text = capsys.readouterr().out
    assert re.match(
        r"\d+\.\d+ \+- \d+\.\d+ bits per dimension \(4 images of .*noise.npz, 3 noise levels", text
    )
    assert main([*common, "--times", "0", "--raw"]) == 0
    assert "all noise levels" in capsys.readouterr().out
    loaded = checkpoint.load_run(run, "ref")
    checkpoint.save_pretrained(loaded.model, tmp_path / "pipe", loaded.diffusion)
    assert main(["eval", str(tmp_path / "pipe"), "--device", "ref"]) == 2
    assert "give --data" in capsys.readouterr().err
    wide = noise(tmp_path / "rgb.npz", 3)
    assert main([*common, "--data", wide]) == 2 and "3 channels: must be 1" in capsys.readouterr().err


def test_info_tells_what_there_is(run, capsys):
    assert main(["info", str(run)]) == 0
    text = capsys.readouterr().out
    for part in ("8x8x1", "2 of 2", "schedule cosine", "block_out_channels", "samples.png", "stats.jsonl"):
        assert part in text
    count = nd.UNet(checkpoint.load_run(run, "ref").model.config, device="ref").params.count
    assert f"{count:,}" in text


def test_sample_and_info_take_a_diffusers_folder(run, tmp_path, capsys):
    loaded = checkpoint.load_run(run, "ref")
    checkpoint.save_pretrained(loaded.model, tmp_path / "pipe", loaded.diffusion)
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for folder, out in zip((run, tmp_path / "pipe"), images):
        args = ["--device", "ref", "--count", "1", "--steps", "2", "--out", str(out)]
        assert main(["sample", str(folder), *args]) == 0
    assert images[0].read_bytes() == images[1].read_bytes()
    assert main(["info", str(tmp_path / "pipe")]) == 0
    assert "settings" not in capsys.readouterr().out


# ---- wrong calls: each is answered by one line with the value, the limit and the remedy

SMALL = dict(
    block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, in_channels=1, out_channels=1
)
SMALL |= dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)


def config(**changes):
    return nd.UNetConfig(**{**SMALL, **changes})


def unet(**changes):
    return nd.UNet(config(**changes), device="ref")


def forward(shape=(2, 8, 8, 1), t=(1, 2), dtype=np.float32, labels=None, **changes):
    return unet(**changes).forward(np.zeros(shape, dtype), np.asarray(t), labels)


def adam(**changes):
    return nd.Adam(unet().params, **changes)


def ddim(shape=(1, 8, 8, 1), **changes):
    return nd.ddim_sample(lambda x, t: x, nd.Diffusion(10), shape, **{"steps": 2, **changes})


def step(x0):
    model = unet()
    return nd.train_step(model, nd.Adam(model.params), nd.Diffusion(10), x0)


WRONG = {
    # networks
    "groups": (lambda: config(norm_num_groups=3), ["norm_num_groups = 3", "divide", "[8, 16]"]),
    "no channels": (lambda: config(block_out_channels=()), ["block_out_channels = ()", "one or more"]),
    "zero channels": (lambda: config(block_out_channels=(8, 0)), ["(8, 0)", "above 0"]),
    "layers": (lambda: config(layers_per_block=0), ["layers_per_block = 0", "above 0"]),
    "blocks": (lambda: config(down_block_types=("DownBlock2D",)), ["down_block_types", "2 blocks"]),
    "block name": (lambda: config(up_block_types=("Up", "UpBlock2D")), ["'Up'", "AttnUpBlock2D"]),
    "head": (lambda: config(attention_head_dim=17), ["attention_head_dim = 17", "from 1 to 16"]),
    "dropout": (lambda: config(dropout=1.0), ["dropout = 1.0", "[0, 1)"]),
    "sample size": (lambda: config(sample_size=9), ["sample_size = 9", "divisible by 2"]),
    "activation": (lambda: config(act_fn="tanh"), ["act_fn = 'tanh'", "'silu'", "'mish'"]),
    "device": (lambda: nd.UNet(config(), device="tpu"), ["'tpu'", "cpu"]),
    "gpu": (lambda: nd.UNet(config(), device="gpu"), ["'gpu'", "cpu"]),
    "float64 on cpu": (lambda: nd.Context("cpu", np.float64), ["float64", "'ref'"]),
    # pictures and times
    "x not 4-D": (lambda: forward((8, 8, 1)), ["(8, 8, 1)", "(B, H, W, 1)"]),
    "x channels": (lambda: forward((2, 8, 8, 3)), ["(2, 8, 8, 3)", "(B, H, W, 1)"]),
    "x sides": (lambda: forward((2, 7, 8, 1)), ["7x8", "divisible by 2", "8x8"]),
    "x integers": (lambda: forward(dtype=np.uint8), ["uint8", "float"]),
    "t length": (lambda: forward(t=(1, 2, 3)), ["(3,)", "2 numbers"]),
    "t negative": (lambda: forward(t=(1, -1)), ["none below 0"]),
    "labels without classes": (lambda: forward(labels=[0, 1]), ["labels", "None", "num_class_embeds"]),
    "labels missing": (lambda: forward(num_class_embeds=3), ["labels", "num_class_embeds = 3"]),
    "labels too large": (lambda: forward(labels=[0, 3], num_class_embeds=3), ["integers from 0 to 2"]),
    "dropout without key": (lambda: forward(dropout=0.5), ["dropout = 0.5", "key=(seed, step)"]),
    "uint8 training": (lambda: step(np.zeros((2, 8, 8, 1), np.uint8)), ["uint8", "to_float"]),
    "list training": (lambda: step([[0.0]]), ["list", "(B,H,W,C)"]),
    # optimiser, diffusion, samplers
    "lr": (lambda: adam(lr=0.0), ["lr = 0.0", "above 0", "2e-4"]),
    "lr nan": (lambda: adam(lr=float("nan")), ["lr = nan", "above 0"]),
    "betas": (lambda: adam(betas=(0.9, 1.0)), ["(0.9, 1.0)", "[0, 1)"]),
    "eps": (lambda: adam(eps=0), ["eps = 0", "1e-8"]),
    "clip": (lambda: adam(clip=-1), ["clip = -1", "None"]),
    "ema": (lambda: adam(ema=1.0), ["ema = 1.0", "0.999"]),
    "no ema": (lambda: adam().with_ema().__enter__(), ["ema=0.999"]),
    "schedule": (lambda: nd.Diffusion(schedule="sqrt"), ["'sqrt'", "cosine", "linear"]),
    "prediction": (lambda: nd.Diffusion(prediction="noise"), ["'noise'", "eps", "x0", "v"]),
    "timesteps": (lambda: nd.Diffusion(timesteps=0), ["timesteps = 0", "at least 1"]),
    "timesteps float": (lambda: nd.Diffusion(timesteps=10.0), ["10.0", "integer"]),
    "times": (lambda: nd.Diffusion(10).scales(np.array([10])), ["10", "0 to 9"]),
    "sampler steps": (lambda: ddim(steps=11), ["steps = 11", "1 to 10"]),
    "no sampler steps": (lambda: ddim(steps=0), ["steps = 0", "1 to 10"]),
    "eta": (lambda: ddim(eta=1.5), ["eta = 1.5", "0", "1"]),
    "seed": (lambda: ddim(seed=-1), ["seed = -1", "from 0"]),
    "sample shape": (lambda: ddim(shape=(0, 8, 8, 1)), ["(0, 8, 8, 1)", "from 1"]),
    "count": (lambda: sample_images(None, nd.Diffusion(10), (8, 8, 1), 0), ["count = 0", "at least 1"]),
    # data and settings
    "data path": (lambda: nd.load_data("no/such/place"), ["no/such/place", "glyphs"]),
    "data size": (lambda: nd.load_data("glyphs", size=0), ["size = 0", "1"]),
    "data channels": (lambda: nd.load_data("glyphs", channels=4), ["channels = 4", "1", "3"]),
    "data split": (lambda: nd.load_data("glyphs", split="val"), ["'val'", "train", "test"]),
    "settings steps": (lambda: TrainSettings(steps=0), ["steps = 0", "from 1 to"]),
    "settings bool": (lambda: TrainSettings(batch=True), ["batch = True", "integer"]),
    "settings batch": (lambda: TrainSettings(batch=1.5), ["batch = 1.5", "integer"]),
    "settings lr": (lambda: TrainSettings(lr=float("nan")), ["lr = nan", "from 0 to 1"]),
    "settings decay": (lambda: TrainSettings(decay="step"), ["'step'", "constant", "cosine"]),
    "settings size": (lambda: TrainSettings(size=(1, 2, 3)), ["(1, 2, 3)", "HxW"]),
    "settings channels": (lambda: TrainSettings(channels="8,x"), ["channels", "32,64"]),
    "settings none": (lambda: TrainSettings(clip=None), ["clip = None", "float"]),
    "threads": (lambda: nd.set_threads(0), ["0", "1"]),
    "threads in a setting": (lambda: train(TrainSettings(threads=10**6)), ["1000000", "NUMBA_NUM_THREADS"]),
    "public name": (lambda: nd.UNET, ["UNET", "UNet"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_answered_with_value_limit_and_remedy(name):
    call, fragments = WRONG[name]
    with pytest.raises((nd.NanodiffError, FileNotFoundError, AttributeError)) as error:
        call()
    text = str(error.value)
    assert all(fragment in text for fragment in fragments), text
    assert "\n" not in text


WRONG_COMMANDS = [
    ("", ["required"]),
    ("fly", ["'fly'", "train"]),
    ("train --step_size 3", ["--step_size"]),
    ("train --steps many", ["--steps", "'many'"]),
    ("train --steps 0", ["steps = 0", "from 1 to"]),
    ("train --lr -1", ["lr = -1.0", "from 0 to 1"]),
    ("train --schedule sqrt", ["--schedule", "'sqrt'", "cosine"]),
    ("train --size 7x7x7", ["(7, 7, 7)", "HxW"]),
    ("train --size 30 --channels 8,8,8", ["30x30", "divisible by 4", "--size 32x32"]),
    ("train --channels 8,16 --attention 3", ["attention = 3", "0 to 2"]),
    ("train --channels 9,18 --layers 1", ["norm_num_groups", "[9, 18]"]),
    ("train --data no/such/place", ["no/such/place", "glyphs"]),
    ("train --data {run}/../noise.npz --out {run} --lr 0.5 --device ref", ["steps = 2, not 20000", "--out"]),
    ("train --data {run}/../noise.npz --out {run}/..", ["holds other files", "--out"]),
    ("sample", ["RUN|FOLDER"]),
    ("sample no/such/run", ["no/such/run", "run folder"]),
    ("sample {run}/samples", ["no run.json", "folder of a run"]),
    ("sample {run} --steps 7 --device ref", ["steps = 7", "1 to 6"]),
    ("sample {run} --eta 2 --device ref", ["eta = 2.0", "0", "1"]),
    ("sample {run} --eta 1 --sampler ddpm", ["--eta 1.0", "ddim"]),
    ("sample {run} --count 0 --device ref", ["count = 0", "at least 1"]),
    ("sample {run} --batch 0 --device ref", ["batch = 0", "at least 1"]),
    ("sample {run} --seed -1 --device ref", ["seed = -1", "from 0"]),
    ("sample {run} --out {run}/nowhere/grid.png", ["nowhere", "does not exist", "make it"]),
    ("sample {run} --device gpu", ["'gpu'", "cpu"]),
    ("info {run}/run.json", ["run.json is not a folder"]),
]


@pytest.mark.parametrize(
    "command, fragments", WRONG_COMMANDS, ids=[c or "nothing" for c, _ in WRONG_COMMANDS]
)
def test_a_wrong_command_is_one_line_and_code_2(run, command, fragments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(run.parent)
    try:
        code = main(command.format(run=run).split())
    except SystemExit as exit:  # argparse's own
        code = exit.code
    said = capsys.readouterr()
    assert code == 2 and said.err.startswith("nanodiff: ") and said.err.count("\n") == 1, said.err
    assert all(fragment in said.err for fragment in fragments), said.err
    assert contents(run.parent) == before and not list(tmp_path.iterdir())


def test_debug_shows_where(run):
    with pytest.raises(nd.NanodiffError, match="count = 0"):
        main(["sample", str(run), "--count", "0", "--device", "ref", "--debug"])


def test_ctrl_c_is_clean(run, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load_run", interrupted)
    assert main(["sample", str(run)]) == 130
    assert capsys.readouterr().err == "nanodiff: interrupted\n"


def test_a_damaged_checkpoint_is_a_warning_on_one_line(tmp_path, capsys):
    folder, args = tmp_path / "run", ["--data", noise(tmp_path / "noise.npz"), "--save-every", "1", *TINY]
    assert main(["train", "--out", str(folder), *args]) == 0
    newest = folder / "checkpoints" / "step-00000002.safetensors"
    tensors = checkpoint.read_checkpoint(newest).tensors
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    said = capsys.readouterr()
    assert "1 of 2" in said.out and said.err.startswith("nanodiff: warning: ") and said.err.count("\n") == 1
    assert main(["train", "--out", str(folder), *args]) == 0  # trains the lost step again: the same bits
    again = checkpoint.read_checkpoint(newest).tensors
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)
    assert newest.with_suffix(".damaged").exists()
