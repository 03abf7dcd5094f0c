"""Every step of bench/ladder/gpu_*.cu computes what the definition says, on the emulated device."""

import importlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import Emulator

from nanodiff import kernels
from nanodiff.kernels import device_gpu

LADDER = Path(__file__).parents[1] / "bench" / "ladder"
ROUNDED = 2.5e-3  # one rounding to bfloat16: 2^-9 / sqrt(3) = 1.1e-3 at the worst place of a power of two
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def run_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(LADDER))
    yield importlib.import_module("run_gpu")
    device_gpu.use(None)


def test_the_steps_are_numbered_and_begin_with_a_lesson():
    for family, count in (("conv", 5), ("norm", 3)):
        paths = sorted(LADDER.glob(f"gpu_{family}_*.cu"))
        assert [p.name.split("_")[2] for p in paths] == [str(i) for i in range(1, count + 1)]
        for i, path in enumerate(paths, 1):
            head = re.match(r"(//.*\n)+", path.read_text())[0]
            assert head.startswith(f"// {i}. ") and "Prediction." in head and head.count("\n") > 8


@compiles
@pytest.mark.parametrize("family, shape", [("conv", (2, 5, 7, 128, 128)), ("norm", (2, 6, 11, 64, 0))])
def test_a_step_agrees_with_the_definition(run_gpu, family, shape):
    device_gpu.use(Emulator(order=2))
    inputs, want, _ = run_gpu.arguments(family, *shape)
    for title, call in run_gpu.steps(family):
        assert run_gpu.error(call(*inputs), want) < ROUNDED, title


@compiles
def test_nanodiffs_own_kernels_are_compared_with(run_gpu):
    device_gpu.use(Emulator(capability=80))
    for family, shape in (("conv", (1, 4, 4, 128, 128)), ("norm", (1, 4, 4, 64, 0))):
        inputs, want, _ = run_gpu.arguments(family, *shape)
        *_, (title, call) = run_gpu.steps(family, kernels.load("gpu"))
        if family == "conv":
            inputs[1] = device_gpu.upload(run_gpu.values(device_gpu.download(inputs[1])), np.float32)
        assert title == "nanodiff" and run_gpu.error(call(*inputs), want) < ROUNDED


@pytest.mark.parametrize("path", sorted(LADDER.glob("gpu_*.cu")), ids=lambda path: path.stem)
def test_a_step_compiles_for_a_gpu(path):
    compiler = pytest.importorskip("cupy.cuda.compiler")
    for arch in ("sm_80", "sm_90a"):
        options = ("-std=c++17", f"-arch={arch}", "--ptxas-options=-v", "-DELEMENT=bf16")
        log = io.StringIO()
        program = compiler._NVRTCProgram(device_gpu.source_text(str(path)), path.name, method="cubin")
        program.compile(options, log)
        spills = re.findall(r"(\d+) bytes spill", log.getvalue())
        assert spills and set(spills) == {"0"}, log.getvalue()


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, LADDER / "run_gpu.py"], capture_output=True, text=True)
    if done.returncode == 0:
        pytest.skip("there is a GPU")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'gpu'" in done.stderr
