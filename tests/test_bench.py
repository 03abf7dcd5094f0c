"""The scripts in bench/ that make tables: what they print, and that they time what a training step calls."""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from emulator import COMPILER, Emulator

import nanodiff as nd
from nanodiff.kernels import device_gpu

ROOT = Path(__file__).parents[1]


def run(name, *args):
    """The lines that a script prints, and the object in the last one."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "bench" / name, *args]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    return lines, json.loads(last)


def test_ops_prints_a_table_and_its_numbers():
    pytest.importorskip("torch")
    lines, out = run("ops.py", "--network", "small", "--op", "concat", "q_sample", "--seconds", "0.01")
    assert out["peak_gflops"] > 1 and out["peak_gbs"] > 1
    (network,), (other,) = out["networks"], out["other"]
    rows = network["rows"]
    assert sum(row["calls"] for row in rows) == 9  # small joins nine skips
    assert sum(line.startswith("  concat") for line in lines) == len(rows) + 1  # and all of them together
    for row in rows:
        assert row["op"] == "concat" and row["ms"] > 0 and row["ratio"] == row["torch_ms"] / row["ms"]
        assert row["bytes"] == 2 * 4 * np.prod([row["dims"][n] for n in "BHW"]) * (
            row["dims"]["C"] + row["dims"]["D"]
        )
    assert other["op"] == "q_sample" and other["calls"] == 0 and other["flops"] > 0


def test_ops_times_what_a_step_calls(monkeypatch):
    """CASES makes, from the dimensions that ops.py reads off a call, arguments like those of the call."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import ops

    from nanodiff import kernels
    from nanodiff.testing import CASES

    def form(a):
        return (a.shape, a.dtype) if isinstance(a, np.ndarray) else a

    def watch(op, function):  # between ops.watched and the op: the arguments as the op gets them
        @functools.wraps(function)
        def call(*args, **options):
            bound = inspect.signature(function).bind(*args, **options)
            bound.apply_defaults()
            seen[op].append({name: form(a) for name, a in bound.arguments.items()})
            return function(*args, **options)

        return call

    k, seen = kernels.load("cpu"), {op: [] for op in CASES}
    for op in CASES:
        monkeypatch.setattr(k, op, watch(op, getattr(k, op)))
    config = ops.NETWORKS["small"] | {"block_out_channels": (8, 16, 24), "sample_size": 8}
    calls = ops.watched(ops.train_step.nanodiff_side(config, 2)[0]["step"])
    assert sum(calls.values()) == sum(map(len, seen.values())) > 100
    own = {"lr", "eps"}  # CASES has values of its own, which cost the same
    for op, dims in calls:
        names = inspect.signature(getattr(k, op)).parameters
        made = {n: form(a) for n, a in zip(names, CASES[op].arguments(dict(dims))) if n not in own}
        if op.endswith("conv_forward"):
            del made["weight"]  # prepared
        assert any(all(call[n] == v for n, v in made.items()) for call in seen[op]), (op, dims, made)


def test_scaling_prints_a_table_and_its_numbers():
    lines, out = run("scaling.py", "--sweep", "batch", "--points", "2", "--turns", "1", "--steps", "1")
    (sweep,) = out["sweeps"]
    assert [row["x"] for row in sweep["points"]] == [1, 2] and sweep["left_out"] == []
    sides = ["nanodiff", "torch channels_last"][: 1 + (importlib.util.find_spec("torch") is not None)]
    assert all(list(row["ms"]) == sides and min(row["ms"].values()) > 0 for row in sweep["points"])
    assert any(line.startswith("      1 ") for line in lines)


def test_scaling_leaves_out_what_would_take_too_long():
    short = ["--sweep", "batch", "--turns", "1", "--steps", "1", "--without-torch", "--limit", "0"]
    lines, out = run("scaling.py", *short)
    assert [row["x"] for row in out["sweeps"][0]["points"]] == [1]
    assert out["sweeps"][0]["left_out"] == [2, 4, 8, 16, 32, 64]
    assert any("left out" in line and "64" in line for line in lines)


# ---- bench/gpu.py, as far as it can be tested without a GPU ----
@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    yield importlib.import_module("gpu")
    device_gpu.use(None)


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_the_correctness_section_finds_all_right_on_the_emulated_device(gpu, capsys):
    device_gpu.use(Emulator())
    rows = gpu.correctness(gpu.TOY)
    assert all(row["ok"] for row in rows), capsys.readouterr().out
    assert {row["op"] for row in rows} >= {
        "conv_backward",
        "attention_backward",
        "training_step",
        "batch_of_one",
    }
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    json.dumps(rows, default=float)


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_the_correctness_section_finds_what_is_wrong(gpu):
    sign = "signal * x + noise * e", "signal * x - noise * e"
    device_gpu.use(Emulator(edit=lambda text: text.replace(*sign)))
    dims = dict(shape=(2, 5, 7, 3), prediction="v")
    rows = [gpu.check_op("q_sample", dims, False)]
    device_gpu.use(Emulator())
    rows.append(gpu.check_op("q_sample", dims, False))
    assert [row["ok"] for row in rows] == [False, True]


def test_without_a_gpu_gpu_py_says_so():
    done = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py"], capture_output=True, text=True)
    if done.returncode != 2:
        pytest.skip("there is a GPU")
    assert done.stderr.count("\n") == 1 and "'gpu'" in done.stderr and not done.stdout


def test_a_timed_part_of_a_recorded_call_leaves_the_rest_out(gpu, monkeypatch):
    """dx and dweight are timed by recording a backward without the launches of the other."""
    from host_backend import Recorder

    from nanodiff import kernels

    recorder = Recorder()
    device_gpu.use(recorder)
    monkeypatch.setitem(
        sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(Event=0, get_elapsed_time=0))
    )
    monkeypatch.setattr(gpu, "timed", lambda call, *rest: 10.0)
    k, empty = kernels.load("gpu"), device_gpu.empty
    x, w, b = (
        empty((2, 8, 8, 64), device_gpu.BF16),
        empty((3, 3, 64, 64), np.float32),
        empty((64,), np.float32),
    )
    device_gpu.register_shadow(w)

    def backward():
        k.conv_backward(x, x, w, 1, (1, 1), w, b)

    seen = {}
    for name, keep in (("all", None), ("dx", lambda s, kernel, d: d.get("LAYOUT") == "NT")):
        recorder.calls.clear()
        assert gpu.ours(backward, keep) == 1.0
        seen[name] = [dict(defines).get("LAYOUT", kernel) for _, kernel, *_, defines in recorder.calls]
    assert seen["dx"] == ["NT"] * 10 and seen["all"].count("NT") == 10 and seen["all"].count("TN") == 10


def test_nothing_starts_when_time_is_up(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "END", [0.0])
    device_gpu.use(Emulator())
    assert gpu.correctness(gpu.TOY) == [] and "left out, time is up" in capsys.readouterr().out
    rows = gpu.whole("small", 2, [])["rows"]
    assert [row["side"] for row in rows] == ["left out"]


def test_ddim_on_tensors_is_ours(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.syspath_prepend(ROOT / "bench")
    train_step = importlib.import_module("train_step")
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 1), dtype=np.float32)
    ours = nd.ddim_sample(lambda x, t: np.tanh(x), nd.Diffusion(), x.shape, steps=50, start=x)
    theirs = train_step.ddim(lambda x, t: torch.tanh(x), torch.from_numpy(x)).numpy()
    assert np.abs(ours - theirs).max() < 1e-4  # the first step multiplies roundings by 20,000, then clips
