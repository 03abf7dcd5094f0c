"""The same bits for any number of threads; every vector width; the compiled kernels follow their sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

ROOT = Path(__file__).parents[1]


def start(code, folder=ROOT, **environment):
    """A process of its own that runs `code` and imports nanodiff from `folder`."""
    env = os.environ | {"PYTHONPATH": str(folder), "NUMBA_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """What it printed, as JSON."""
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(out)


def python(code, folder=ROOT, **environment):
    return finish(start(code, folder, **environment))


# Attention, Winograd (16x24 pixels; 8x12 too without the matrix unit) and direct convolutions, three images
# for three threads.
TRAIN = """
import hashlib, json
import numpy as np
import nanodiff as nd

config = nd.UNetConfig(
    block_out_channels=(16, 32, 128), attention_head_dim=8, in_channels=3, out_channels=3, dropout=0.1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
x0 = np.random.default_rng(0).uniform(-1, 1, (3, 16, 24, 3)).astype(np.float32)
digests = {}
for threads in THREADS:
    nd.set_threads(threads)
    model = nd.UNet(config, init="torch")
    opt, diff = nd.Adam(model.params, lr=1e-3, clip=1.0, ema=0.999), nd.Diffusion()
    losses = [nd.train_step(model, opt, diff, x0, key=(1, step)) for step in range(3)]
    assert opt.state[2] == 3 and len(set(losses)) == 3
    out = nd.ddim_sample(model, diff, (2, 16, 24, 3), steps=2)
    parts = dict(weights=model.params.data, ema=opt.ema, v=opt.v, grad=model.params.grad, sample=out)
    digests[threads] = {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in parts.items()}
    digests[threads]["losses"] = losses
print(json.dumps(digests))
"""


def test_training_gives_the_same_bits_for_1_2_and_3_threads():
    found = python(TRAIN.replace("THREADS", "(3, 1, 2)"), NUMBA_NUM_THREADS="3")
    assert found["1"] == found["2"] == found["3"]
    # and in a process that has one thread only
    assert python(TRAIN.replace("THREADS", "(1,)"))["1"] == found["3"]


WIDTHS = """
import json
import numpy as np
from nanodiff.kernels import parallel_cpu, simd_cpu
from nanodiff.testing import CASES, assert_close, run

assert (parallel_cpu.VECTOR, parallel_cpu.AMX) == (WIDTH, UNIT)
cases = {"conv_forward": [5, 7, 9, 18], "conv_backward": [5, 7, 9, 18], "linear_forward": [3, 6]}
if UNIT:
    cases |= {"conv_forward": [1, 5, 7, 18, 22, 29, 30, 31], "conv_backward": [1, 5, 7, 18, 22, 29, 30, 31]}
    cases |= {"upconv_forward": [3, 4], "upconv_backward": [3, 4]}
if WIDTH >= 8:
    cases |= {"linear_backward": [3, 6, 11], "attention_forward": [6, 7], "attention_backward": [6, 7]}
for op, chosen in cases.items():
    for dims in (CASES[op].shapes[i] for i in chosen):
        arguments = CASES[op].arguments(dims)
        want, got = run("ref", op, arguments, np.float64), run("cpu", op, arguments)
        for a, b in zip(got, want):
            assert_close(a, b, **CASES[op].limits(dims), what=f"{op} {dims}")
print(json.dumps("ok"))
"""


@pytest.fixture(scope="module", autouse=True)
def widths():
    """A process for each vector width, in the background of all tests here: they mostly compile."""
    features, running = llvm.get_host_cpu_features(), {}
    here = {16: features.get("avx512f"), 8: features.get("avx2") and features.get("fma"), 4: True, 1: True}
    for width, amx in ((16, "0"), (8, "0"), (4, "emulate"), (4, "0"), (1, "0")):
        if here[width]:
            unit = 2 * (amx == "emulate")
            code = WIDTHS.replace("WIDTH", str(width)).replace("UNIT", str(unit))
            running[width, amx] = start(code, NANODIFF_VECTOR=str(width), NANODIFF_AMX=amx)
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("width, amx", [(16, "0"), (8, "0"), (4, "emulate"), (4, "0"), (1, "0")])
def test_every_vector_width(widths, width, amx):
    """AVX-512, AVX2, the width of NEON, and none; and what a matrix unit runs, emulated."""
    if (width, amx) not in widths:
        pytest.skip("this processor has no vectors of that width with fused multiply-add")
    assert finish(widths[width, amx]) == "ok"


DIRECT = """
import json
import numpy as np
from nanodiff.testing import CASES, run

dims = dict(B=2, H=12, W=12, C=64, O=64, K=3, stride=1, pad=(1, 1), plus="")
errors = []
for op in ("conv_forward", "conv_backward"):
    arguments = CASES[op].arguments(dims)
    want, got = run("ref", op, arguments, np.float64), run("cpu", op, arguments)
    errors += [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(want, got)]
print(json.dumps(max(errors)))
"""


def test_direct_convolution():
    """The fast methods cost a digit (bench/accuracy.py); who needs it back says NANODIFF_CONV=direct."""
    fast, direct = start(DIRECT), start(DIRECT, NANODIFF_CONV="direct")
    assert finish(direct) < 1e-6 < finish(fast) < 1e-5


LINEAR = """
import json
import numpy as np
from nanodiff.kernels import linear_cpu, parallel_cpu
x, weight, bias = np.full((1, 3), 2, np.float32), np.ones((3, 2), np.float32), np.ones(2, np.float32)
out = linear_cpu.linear_forward(x, weight, bias)
files = len(list(parallel_cpu.CACHE.rglob("*.nbi"))) if parallel_cpu.CACHE else None
print(json.dumps([out[0].tolist(), files]))
"""


def test_the_cache_follows_every_source(tmp_path):
    """Numba's cache looks at the file of a kernel alone; here a helper in another file changes under it."""
    shutil.copytree(ROOT / "nanodiff", tmp_path / "nanodiff", ignore=shutil.ignore_patterns("__pycache__"))
    cache = dict(NUMBA_CACHE_DIR=str(tmp_path / "cache"), NANODIFF_AMX="0")
    out, files = python(LINEAR, tmp_path, **cache)
    assert out == [7, 7] and files > 0
    assert python(LINEAR, tmp_path, **cache) == [out, files]  # read from the cache: nothing was added to it
    helper = tmp_path / "nanodiff/kernels/simd_cpu.py"
    edit = "\n\ndef _splat(b, scalar, before=_splat):\n    return before(b, b.fadd(scalar, scalar))\n"
    helper.write_text(helper.read_text() + edit)
    assert python(LINEAR, tmp_path, **cache)[0] == [13, 13]  # every product counts twice


def test_without_a_place_for_a_cache_kernels_still_run(tmp_path):
    (tmp_path / "file").write_text("no folder can be made under a file")
    assert python(LINEAR, NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache")) == [[7, 7], None]
