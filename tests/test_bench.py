"""The scripts in bench/ that make tables: what they print, and that they time what a training step calls."""

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    calls = ops.watched(ops.train_step.nanodiff_side(config, 2)[0])
    assert sum(calls.values()) == sum(map(len, seen.values())) > 100
    own = {"lr", "eps"}  # CASES has values of its own, which cost the same
    for op, dims in calls:
        names = inspect.signature(getattr(k, op)).parameters
        made = {n: form(a) for n, a in zip(names, CASES[op].arguments(dict(dims))) if n not in own}
        if op == "conv_forward":
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
