"""Every script in examples/ runs as a user would run it; and the two moons are found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nanodiff as nd

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(name, folder, *args):
    """A script of examples/, two training steps long, on the device that compiles nothing; what it prints."""
    command = [sys.executable, ROOT / "examples" / name, "--steps", "2", "--device", "ref", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}  # more lose time on busy cores
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def mnist_folder(folder, rng):
    """Ten images of 28x28 as MNIST's plain idx files: a header of big-endian integers, then bytes."""
    for kind, shape in (("images-idx3", (10, 28, 28)), ("labels-idx1", (10,))):
        header = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
        bytes_ = rng.integers(0, 10, shape, dtype=np.uint8).tobytes()
        (folder / f"train-{kind}-ubyte").write_bytes(header + bytes_)


def cifar10_folder(folder, rng):
    """Ten images of 32x32 as a binary batch of CIFAR-10: a label, then the red, green and blue planes."""
    (folder / "data_batch_1.bin").write_bytes(rng.integers(0, 10, (10, 3073), dtype=np.uint8).tobytes())


USES = {  # of a trained model: what is printed
    "interpolate.py": r"to noise and back in 1 steps: off by \d+\.\d%",
    "image_to_image.py": r"strength 1.0: from t = 5 in 2 steps, \d+% away",
    "inpaint.py": r"RePaint: \d\.\d+ across the seam",
}
IMAGE_SETS = {"train_mnist.py": (mnist_folder, 28), "train_cifar10.py": (cifar10_folder, 32)}


@pytest.mark.parametrize("name", ["two_moons.py", "guided.py"])
def test_without_a_gpu_one_line_says_what_was_looked_for(name, tmp_path):
    try:
        nd.Context("gpu")
    except nd.NanodiffError as error:
        says = str(error)
    else:
        pytest.skip("there is a GPU")
    command = [sys.executable, ROOT / "examples" / name, "--device", "gpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith(says)


def test_every_example_has_a_test():
    others = {"two_moons.py", "steps_needed.py", "when_to_stop_noise.py", "guided.py"}
    assert set(SCRIPTS) == {*IMAGE_SETS, *USES, *others}


@pytest.mark.parametrize("name", IMAGE_SETS)
def test_training_scripts(name, tmp_path):
    make, side = IMAGE_SETS[name]
    make(tmp_path, np.random.default_rng(0))
    out = run(name, tmp_path, "--data", str(tmp_path), "--batch", "2", "--samples", "1", "--out", "out.png")
    assert "10 images" in out
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape[:2] == (2 * (side + 4),) * 2  # 2 pixels of border on each side, drawn twice as large
    assert picture[4:-4, 4:-4].std() > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on images of noise with classes."""
    from nanodiff.train import TrainSettings, train

    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "noise.npz", images=images, labels=np.arange(20) % 2)
    return train(TrainSettings(
        data=str(folder / "noise.npz"), out=str(folder / "run"), device="ref", steps=2, batch=2, timesteps=6,
        channels=(8, 16), layers=1, samples=2, labels=True,
    ))  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_scripts_that_use_a_model(name, trained, tmp_path):
    more = {"interpolate.py": ["--pairs", "2"], "inpaint.py": ["--repeats", "2", "--count", "3"]}
    out = run(name, tmp_path, str(trained), "--out", "out.png", *more.get(name, ["--count", "3"]))
    assert re.search(USES[name], out), out
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 0


def test_guided(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "noise.npz", images=rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8),
             labels=np.arange(20) % 2)  # fmt: skip
    out = run("guided.py", tmp_path, "--data", "noise.npz", "--samples", "4", "--out", "out.png")
    assert len(re.findall(r"guidance \d: \d+% are nearest to the class asked for", out)) == 4
    assert (
        np.asarray(Image.open(tmp_path / "out.png")).shape[:2] == (2 * (4 * 10 + 2),) * 2
    )  # 2 pixels between, drawn twice as large


@pytest.mark.parametrize("steps, low, high", [(2, 0.2, 1), (300, 0.02, 0.15)])  # 0.43 and 0.08 are typical
def test_two_moons_draws_and_measures(steps, low, high, tmp_path):
    out = run("two_moons.py", tmp_path, "--out", "moons.gif", "--steps", str(steps))
    found, real = map(float, re.search(r"moons ([\d.]+), that of real data ([\d.]+)", out).groups())
    assert low < found < high and 0.02 < real < 0.03  # |N(0, 0.03)| has the mean 0.024
    with Image.open(tmp_path / "moons.gif") as gif:
        assert gif.n_frames == 50 and gif.size == (400, 400)
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
    assert all((a != b).any() for a, b in zip(frames, frames[1:]))
    redness = frames[-1][:, :, 0] - frames[-1][:, :, 2]
    assert (redness > 50).sum() > 500 and (redness < -50).sum() > 500  # neither moon is left out


def test_steps_needed_prints_the_table(tmp_path):
    out = run("steps_needed.py", tmp_path, "--points", "20")
    rows = {name.strip(): numbers for name, _, numbers in (row.partition("|") for row in out.splitlines())}
    for steps in (2, 5, 10, 20, 50, 100, 1000):
        distances, energies = (list(map(float, part.split())) for part in rows[str(steps)].split("|"))
        assert len(distances) == len(energies) == 3 and np.isfinite(distances + energies).all()
    assert 0.01 < float(rows["real data"].split("|")[0]) < 0.04


def test_when_to_stop_noise_prints_the_table(tmp_path):
    out = run("when_to_stop_noise.py", tmp_path, "--points", "20")
    rows = re.findall(r"(never|\d+) \| +(-?[\d.]+) +([\d.]+) \| +(-?[\d.]+) +([\d.]+)", out)
    assert [row[0] for row in rows] == ["never", "100", "300", "500", "700", "900", "1000"]
    assert rows[0][1:3] == rows[0][3:] and rows[-1][1:3] != rows[-1][3:] and "real data" in out


def test_backward_of_the_mlp_is_the_slope(monkeypatch):
    """Central differences in float64: their error is 1e-9 at this step, and the slope is of order 1."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import two_moons

    ctx, rng = nd.Context("ref", np.float64), np.random.default_rng(0)
    model = two_moons.MLP(ctx, seed=0, width=8)
    x, t, dout = rng.standard_normal((5, 2)), rng.integers(0, 1000, 5), rng.standard_normal((5, 2))
    along, start = rng.standard_normal(model.params.data.shape), model.params.data.copy()
    ctx.saving = True
    model.forward(x, t)
    model.backward(dout)
    ctx.saving = False
    values = []
    for sign in (1, -1):
        model.params.data[...] = start + sign * 1e-5 * along
        values.append((model.forward(x, t) * dout).sum())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(model.params.grad @ along, rel=1e-6)
