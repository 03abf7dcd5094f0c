"""The runtime on the GPU without a GPU: memory, recorded steps, a whole network, training and sampling."""

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from emulator import FLAGS, Emulator, compiled
from host_backend import HostBackend, Recorder
from hypothesis import given, settings
from hypothesis import strategies as st

import nanodiff as nd
from nanodiff import checkpoint, data, graph, train
from nanodiff.kernels import device_gpu
from nanodiff.kernels.device_gpu import ALIGN, plan
from nanodiff.testing import assert_close

ROOT = Path(__file__).parents[1]

drawn = settings(deadline=None, derandomize=True, max_examples=60)
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(autouse=True)
def cupy_again():
    """Whatever a test puts in CuPy's place is gone after it."""
    yield
    device_gpu.use(None)


# ---- the plan of a step's memory ----
@drawn
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), max_size=40))
def test_arrays_that_live_at_the_same_time_do_not_overlap(arrays):
    """(size, life) of arrays born one after another; they die in the order that their lives say."""
    events, alive = [], {}
    for number, (size, life) in enumerate(arrays):
        events.append((number, size * ALIGN))
        alive[number] = life
        for n in [n for n in alive if alive[n] == 0]:
            events.append((n, 0))
            del alive[n]
        alive = {n: left - 1 for n, left in alive.items()}
    offsets, total = plan(events)
    check_plan(events, offsets, total)


def check_plan(events, offsets, total):
    """Plays a step's births and deaths: no living arrays overlap, none lies outside, all are aligned."""
    living, fullest = {}, 0
    for number, size in events:
        if not size:
            del living[number]
            continue
        low, high = offsets[number], offsets[number] + size
        assert 0 <= low and high <= total and low % ALIGN == 0
        assert not [n for n, (a, b) in living.items() if a < high and low < b]
        living[number] = low, high
        fullest = max(fullest, sum(b - a for a, b in living.values()))
    assert total <= max(ALIGN, 2 * fullest)  # far from wasteful; see the figures of a real step below
    return fullest


# ---- memory, launches, recording; kernels written in Python ----
class Toy(HostBackend):
    """Kernels over float32 arrays: sum(a, b, out, n) and double(a, n)."""

    def load(self, source, kernel, smem, defines):
        def floats(address, n):
            return np.ctypeslib.as_array((ctypes.c_float * int(n)).from_address(int(address)))

        def run(grid, block, args, smem):
            *arrays, n = args
            arrays = [floats(a, n) for a in arrays]
            if kernel == "sum":
                arrays[2][...] = arrays[0] + arrays[1]
            else:
                arrays[0][...] *= 2

        return run


def add(a, b):
    out = device_gpu.empty(a.shape, np.float32)
    device_gpu.launch("toy.cu", "sum", (1,), (32,), [a, b, out, a.size])
    return out


@pytest.fixture(params=[False, True], ids=["at once", "as late as may be"])
def toy(request):
    device_gpu.use(Toy(lazy=request.param))
    return device_gpu.backend()


def test_memory_is_used_again_when_an_array_dies(toy):
    a = device_gpu.empty((3, 5), np.float32)
    view, address = a[1:2], toy.address(a)
    del a
    b = device_gpu.empty(15, np.float32)
    assert toy.address(b) != address  # the view lives
    del view
    assert toy.address(device_gpu.empty((2, 7), np.float32)) == address
    assert toy.counts["reserved"] == 2
    for shape, dtype in (((), np.float64), ((0,), np.int32), ((2, 3), device_gpu.BF16)):
        c = device_gpu.empty(shape, dtype)
        assert c.shape == shape and c.dtype == dtype and toy.address(c) % ALIGN == 0


def test_results_are_those_of_the_order_of_the_program(toy):
    a = device_gpu.upload(np.arange(4, dtype=np.float32))
    for _ in range(5):
        a = add(a, add(a, a))  # temporaries die before a late stream has read them
    assert np.array_equal(device_gpu.download(a), 3.0**5 * np.arange(4))
    assert toy.counts["launches"] == 10 and toy.counts["reserved"] <= 4


def test_a_recorded_step_does_what_the_step_does(toy):
    x = device_gpu.upload(np.ones(100, np.float32))

    def step():
        y = add(x, x)
        z = add(y, y)
        del y
        device_gpu.copy(x, add(z, x))  # x = 5 x

    graph = toy.record(step)
    assert np.array_equal(device_gpu.download(x), np.ones(100))  # nothing ran yet
    assert graph.bytes == 1024 and len(graph.offsets) == 3  # two of the three live at a time
    check_plan(graph.events, graph.offsets, graph.bytes)
    before = dict(toy.counts)
    others = [device_gpu.empty(100, np.float32) for _ in range(4)]  # memory that is not the step's
    for _ in range(3):
        graph.launch()
    assert np.array_equal(device_gpu.download(x), np.full(100, 125))
    assert toy.counts["reserved"] - before["reserved"] == len(others)


def test_what_a_recorded_step_may_not_do(toy):
    x, sizes = device_gpu.upload(np.ones(4, np.float32)), iter([1000, 2000])
    with pytest.raises(RuntimeError, match="host reads"):
        toy.record(lambda: device_gpu.download(x))
    with pytest.raises(RuntimeError, match="upload"):
        toy.record(lambda: device_gpu.upload(np.ones(4)))
    with pytest.raises((RuntimeError, IndexError)):
        toy.record(lambda: device_gpu.empty(next(sizes), np.float32))
    assert np.array_equal(device_gpu.download(add(x, x)), np.full(4, 2))  # and all is as before


def test_arguments_are_what_a_kernel_expects():
    device_gpu.use(Recorder())
    size = np.array([(3, 2.5)], [("n", "i4"), ("s", "f4")])
    x = device_gpu.empty((4,), np.float32)
    device_gpu.launch(
        "a.cu", "k", (1, 2), (32,), [x, None, 7, 0.5, True, np.float64(1), size], 16, [("A", 1)]
    )
    source, kernel, grid, block, args, smem, defines = device_gpu.backend().calls[-1]
    assert (source, kernel, grid, block, smem) == ("a.cu", "k", (1, 2, 1), (32, 1, 1), 16)
    assert defines == (("A", 1),) and args[0] == device_gpu.backend().address(x)
    assert [a.dtype for a in args] == [np.uint64, np.uint64, "i4", "f4", "i4", "f8", size.dtype]
    with pytest.raises(OverflowError):
        device_gpu.launch("a.cu", "k", (1,), (32,), [2**31])


def test_includes_are_put_in_once_and_lines_keep_their_numbers(tmp_path, monkeypatch):
    (tmp_path / "a.cu").write_text('// a\n#include "b.cuh"\n#include "c.cuh"\nlast\n')
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "c.cuh"\nin b\n')
    (tmp_path / "c.cuh").write_text("#pragma once\nin c\n")
    monkeypatch.setattr(device_gpu, "HERE", tmp_path)
    text, file, number, found = device_gpu.source_text("a.cu"), None, 0, {}
    for line in text.splitlines():
        number += 1
        if line.startswith("#line"):
            words = line.split()
            number, file = int(words[1]) - 1, words[2].strip('"') if len(words) > 2 else file
        elif line.startswith(("in ", "last")):
            assert line not in found
            found[line] = file, number
    assert found == {"in c": ("c.cuh", 2), "in b": ("b.cuh", 3), "last": ("a.cu", 4)}


# ---- a whole network on the emulated device ----
TINY = nd.UNetConfig(  # odd widths, attention down, in the middle and up, classes, dropout
    sample_size=8, in_channels=3, out_channels=3, block_out_channels=(12, 20), layers_per_block=1,
    norm_num_groups=4, attention_head_dim=10, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), dropout=0.2, num_class_embeds=4,
)  # fmt: skip
# float32: some 60 operations one after another, each with an error of about 1e-7 relative to its result.
# bfloat16: each of them rounds its result to 8 bits, 2^-9 / sqrt(3) = 1.1e-3 relative RMS, and weights are
# rounded so too: 1.1e-3 sqrt(2 * 60) = 1.2e-2.
LIMITS = {"float32": 3e-6, "bfloat16": 2.5e-2}


def there_and_back(model):
    """Output, gradient of the input and gradients of all weights, in float64."""
    rng, ctx = np.random.default_rng(0), model.ctx
    x, dout = rng.standard_normal((2, 2, 8, 8, 3), dtype=np.float32)
    out = model.forward(ctx.to_device(x), np.array([3, 700]), np.array([1, 3]), key=(5, 7))
    dx = model.backward(ctx.to_device(dout))
    return [np.asarray(ctx.to_host(a), np.float64) for a in (out, dx, model.params.grad)]


@compiles
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_whole_network_is_that_of_the_definition(dtype):
    ref = nd.UNet(TINY, device="ref", dtype="float64", init="torch")
    want = there_and_back(ref)
    device_gpu.use(Emulator(order=1))
    gpu = nd.UNet(TINY, device="gpu", dtype=dtype, init="torch")
    got = there_and_back(gpu)
    for name, a, b in zip(("out", "dx", "gradients"), got, want):
        assert_close(a, b, error=LIMITS[dtype], what=name)
    scale = np.sqrt(np.square(want[2]).mean())
    for name in ref.params:  # each tensor by itself, as far as it is not nothing (the bias of a key)
        p = ref.params[name]
        here = slice(p.start, p.start + p.size)
        assert_close(got[2][here], want[2][here], error=5 * LIMITS[dtype], floor=0.1 * scale, what=name)
    out = gpu.predict(np.zeros((1, 8, 8, 3), np.float32), [5], [0])
    assert device_gpu.on_device(out) and out.shape == (1, 8, 8, 3) and out.dtype == np.float32


# ---- training ----
BATCH, SEED = 4, 3
CLASSES = nd.UNetConfig(
    sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), dropout=0.1, num_class_embeds=4,
)  # fmt: skip
DIFFUSION = nd.Diffusion(prediction="v")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10, 8, 8, 1), np.uint8), rng.integers(0, 4, 10)


def rate(step):
    return 2e-3 / (1 + step)


def new(device, dtype=None):
    model = nd.UNet(CLASSES, device=device, dtype=dtype)
    return model, nd.Adam(model.params, clip=1.0, ema=0.99)


def step_by_step(images, steps, device, dtype=None):
    """Losses, then the state of the optimiser and all weights after them: eager steps."""
    model, opt = new(device, dtype)
    losses = []
    for step in range(steps):
        chosen = data.batch_indices(len(images[0]), BATCH, step, SEED)
        x0 = data.to_float(data.flip(images[0][chosen], SEED, step))
        key = SEED, step
        losses.append(nd.train_step(model, opt, DIFFUSION, x0, images[1][chosen], key, rate(step)))
    return losses, everything(model, opt)


def recorded(images, steps, dtype):
    """The same by recorded steps; and the counters before and after them."""
    model, opt = new("gpu", dtype)
    training = graph.Training(model, opt, DIFFUSION, *images, BATCH, SEED, flip=True)
    counts, done = [dict(device_gpu.backend().counts)], []
    for step in range(steps):
        done += training.step(step, rate(step), wait=step == steps - 1)
    counts.append(dict(device_gpu.backend().counts))
    assert [number for number, *_ in done] == list(range(steps))
    return [loss for _, loss, *_ in done], everything(model, opt), counts


def everything(model, opt):
    arrays = model.params.data, opt.m, opt.v, opt.ema, opt.state
    return [np.array(model.ctx.to_host(a)) for a in arrays]


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@compiles
def test_twenty_steps_are_those_of_the_cpu(images):
    want, _ = step_by_step(images, 20, "cpu")
    device_gpu.use(Emulator())
    got, after, (before, later) = recorded(images, 20, "float32")
    # Adam divides by the root of the second moment, so small gradients' rounding errors grow; as for PyTorch
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert after[4].tolist()[2:] == [20, 0]
    assert later == before  # no memory, no host read, and no launch but the recorded ones


@compiles
@pytest.mark.parametrize("dtype", LIMITS)
def test_recorded_steps_are_the_bits_of_eager_ones(images, dtype):
    """However late the device is, and across the end of the ring (8 steps)."""
    device_gpu.use(Emulator())
    losses, after = step_by_step(images, 10, "gpu", dtype)
    for lazy, order in ((False, 0), (True, 3)):
        device_gpu.use(Emulator(lazy=lazy, order=order))
        got = recorded(images, 10, dtype)
        assert got[0] == losses and same(got[1], after)


@compiles
def test_a_bad_step_changes_nothing_and_is_counted(images):
    device_gpu.use(Emulator())
    model, opt = new("gpu", "float32")
    training = graph.Training(model, opt, DIFFUSION, *images, BATCH, SEED)
    ctx = model.ctx
    training.step(0, 1e-3, wait=True)
    good = everything(model, opt)
    ctx.copy(model.params["conv_out.bias"].data, ctx.to_device(np.array([np.nan])))
    broken = everything(model, opt)
    ((_, loss, _, skipped),) = training.step(1, 1e-3, wait=True)
    after = everything(model, opt)
    assert np.isnan(loss) and skipped == 1 and after[4][2] == 1
    assert same(after[:4], broken[:4]) and same(after[1:4], good[1:4])


# ---- run folders ----
@pytest.fixture
def make(tmp_path):
    path = tmp_path / "noise.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (21, 8, 8, 1), dtype=np.uint8))

    def settings(out, device, **changes):
        default = dict(
            data=str(path), out=str(tmp_path / out), steps=12, batch=4, lr=1e-3, warmup=5, clip=0.5, ema=0.9,
            seed=3, decay="constant", prediction="eps", device=device, dtype="float32", flip=True,
            channels=(8, 16), layers=1, attention=1, dropout=0.1, timesteps=4, log_every=3, sample_every=100,
            save_every=5, samples=2,
        )  # fmt: skip
        return train.TrainSettings(**{**default, **changes})

    return settings


def left(folder):
    """Tensors of the last checkpoint, and what of stats.jsonl does not depend on the clock."""
    saved = checkpoint.load_checkpoint(folder)
    keys = ("step", "loss", "lr", "grad_norm", "skipped")
    return saved, [[r[key] for key in keys] for r in checkpoint.read_stats(folder)]


@compiles
def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(make):
    device_gpu.use(Emulator())
    cpu = left(train.train(make("cpu", "cpu", dtype=None)))
    for steps, device, dtype in ((4, "cpu", None), (8, "gpu", "float32"), (12, "cpu", None)):
        mixed = left(train.train(make("mixed", device, steps=steps, dtype=dtype)))
    assert mixed[0].step == 12 and mixed[0].tensors.keys() == cpu[0].tensors.keys()
    for name, want in cpu[0].tensors.items():
        assert mixed[0].tensors[name].dtype == want.dtype
        if name == "state":
            np.testing.assert_allclose(mixed[0].tensors[name], want, rtol=1e-3)
        else:
            assert_close(mixed[0].tensors[name], want, error=1e-3, what=name)
    np.testing.assert_allclose(np.array(mixed[1], float), np.array(cpu[1], float), rtol=1e-3)


@compiles
def test_an_interrupted_run_on_the_gpu_is_the_same_bits(make, monkeypatch, capsys):
    """Ctrl-C comes while results of earlier steps are still on their way."""
    device_gpu.use(Emulator())
    whole = left(train.train(make("whole", "gpu", steps=9, dtype=None)))
    real = graph.Training.step

    def step(self, number, *args, **options):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, number, *args, **options)

    monkeypatch.setattr(graph.Training, "step", step)
    train.train(make("parts", "gpu", steps=9, dtype=None, log_every=100, save_every=100))
    assert "stopped at step" in capsys.readouterr().out
    monkeypatch.undo()
    stopped = checkpoint.load_checkpoint(make("parts", "gpu").out)
    assert stopped.step in (4, 5) and len(stopped.meta["window"]) == stopped.step
    parts = left(train.train(make("parts", "gpu", steps=9, dtype=None)))
    assert [row[0] for row in parts[1]] == [6, 9] and parts[1][-1] == whole[1][-1]
    assert same(*([run.tensors[name] for name in sorted(run.tensors)] for run in (parts[0], whole[0])))
    run = checkpoint.load_run(make("parts", "gpu").out, device="cpu")  # and sampled on the CPU
    assert nd.ddim_sample(run.model, run.diffusion, (1, *run.shape), steps=2).shape == (1, 8, 8, 1)


@compiles
def test_bad_steps_in_a_row_end_a_run_on_the_gpu(make, monkeypatch):
    device_gpu.use(Emulator())
    monkeypatch.setattr(nd.Diffusion, "scales", lambda self, t: (np.full(len(t), np.nan, np.float32),) * 2)
    with pytest.raises(nd.NanodiffError, match="steps 1 to 5 had no finite loss"):
        train.train(make("run", "gpu"))
    assert checkpoint.load_checkpoint(make("run", "gpu").out) is None


# ---- sampling ----
@compiles
def test_samples_are_those_of_the_cpu(images):
    labels = np.array([2, 0, 1])
    cpu = nd.UNet(CLASSES, init="torch")
    want = nd.ddim_sample(cpu, DIFFUSION, (3, 8, 8, 1), steps=4, eta=1.0, seed=5, labels=labels)
    device_gpu.use(Emulator())
    gpu = nd.UNet(CLASSES, device="gpu", dtype="float32", init="torch")
    seen = []

    def watch(i, n, t, x, x0):
        seen.append((i, n, t, x, x0))

    for lazy in (False, True):
        device_gpu.use(Emulator(lazy=lazy))
        gpu = nd.UNet(CLASSES, device="gpu", dtype="float32", init="torch")
        got = nd.ddim_sample(gpu, DIFFUSION, (3, 8, 8, 1), steps=4, eta=1.0, seed=5, labels=labels)
        np.testing.assert_allclose(got, want, atol=2e-5)
        one = nd.ddim_sample(
            gpu, DIFFUSION, (1, 8, 8, 1), 4, 1.0, 5, labels=labels[1:2], first=1, callback=watch
        )
        assert one.tobytes() == got[1:2].tobytes()
    assert [s[:2] for s in seen[:4]] == [(i, 4) for i in range(4)]
    assert np.array_equal(seen[-1][3], one) and not np.array_equal(seen[-2][3], one)
    nan = gpu.ctx.to_device(np.full(gpu.params.data.shape, np.nan, np.float32))
    gpu.ctx.copy(gpu.params.data, nan)
    with pytest.raises(nd.NanodiffError, match="not finite"):
        nd.ddim_sample(gpu, DIFFUSION, (1, 8, 8, 1), steps=2, labels=labels[:1])


@compiles
@pytest.mark.parametrize(
    "options",
    [dict(guidance=2.0), dict(dynamic=0.9), dict(edit=lambda x, p: 0.5 * x), dict(eta_stop=500, eta=1.0)],
)
def test_other_ways_of_sampling_are_those_of_the_cpu(options):
    labels, shape = np.array([2, 0]), (2, 8, 8, 1)
    cpu = nd.UNet(CLASSES, init="torch")
    want = nd.ddim_sample(cpu, DIFFUSION, shape, steps=3, labels=labels, **options)
    device_gpu.use(Emulator(lazy=True))
    gpu = nd.UNet(CLASSES, device="gpu", dtype="float32", init="torch")
    np.testing.assert_allclose(
        nd.ddim_sample(gpu, DIFFUSION, shape, steps=3, labels=labels, **options), want, atol=5e-5
    )


@compiles
@pytest.mark.parametrize("options", [dict(min_snr=5.0, label_drop=0.5), dict(offset_noise=0.1)])
def test_other_ways_of_training_are_those_of_the_cpu(images, options):
    def eager(device, dtype):
        model, opt = new(device, dtype)
        x0 = data.to_float(images[0][data.batch_indices(10, BATCH, 0, SEED)])
        labels = images[1][data.batch_indices(10, BATCH, 0, SEED)]
        loss = nd.train_step(model, opt, DIFFUSION, x0, labels, (SEED, 0), 1e-3, **options)
        return loss, everything(model, opt)

    want = eager("cpu", None)
    device_gpu.use(Emulator())
    got = eager("gpu", "float32")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    if "offset_noise" not in options:  # which is not recorded
        model, opt = new("gpu", "float32")
        training = graph.Training(model, opt, DIFFUSION, *images, BATCH, SEED, **options)
        ((_, loss, *_),) = training.step(0, 1e-3, wait=True)
        assert loss == got[0] and same(everything(model, opt), got[1])


@compiles
def test_a_recorded_sampler_sees_new_weights(images):
    device_gpu.use(Emulator())
    model = nd.UNet(CLASSES, device="gpu", init="torch")  # bfloat16: through the copy of the weights
    opt = nd.Adam(model.params, ema=0.9)

    def draw():
        return nd.ddim_sample(model, DIFFUSION, (1, 8, 8, 1), steps=2, labels=np.array([1]))

    first, kept = draw(), model._sampling[1]
    model.ctx.copy(opt.ema, model.ctx.to_device(np.zeros(opt.ema.shape)))
    with opt.with_ema():
        zero = draw()
    assert not np.array_equal(zero, first) and np.array_equal(draw(), first) and model._sampling[1] is kept
    fresh = nd.UNet(CLASSES, device="gpu", init="torch")
    fresh.ctx.copy(fresh.params.data, opt.ema)
    assert np.array_equal(nd.ddim_sample(fresh, DIFFUSION, (1, 8, 8, 1), 2, labels=np.array([1])), zero)


# ---- CuPy's side: its own arrays, over a driver that is played by the emulator ----
class Driver:
    """What the CuPy backend asks of `cupy` and a driver; a stream that runs at once or is being captured."""

    def __init__(self, memory=1 << 40):
        cupy = pytest.importorskip("cupy")
        host, stream = Emulator(), self
        self.captured, self.left, self.limits = None, memory, {}

        class Memory:
            def __init__(self, size):
                self.size = 0
                if size > stream.left:
                    raise MemoryError
                stream.left -= size
                self.ptr, self.size = host.reserve(size), size

            def __del__(self):
                stream.left += self.size

        class Kernel:
            def __init__(self, library, name):
                self.kernel = library[f"cpu_{name}"]
                self.at = library._name, name

            def limit(self, most):
                stream.limits[self.at] = most

            max_dynamic_shared_size_bytes = property(None, limit)

            def __call__(self, grid, block, args, shared_mem):
                assert shared_mem <= stream.limits.get(self.at, 48 << 10)
                held = [np.atleast_1d(a) for a in args]
                assert all(a.dtype.names or a.dtype.kind in "iuf" for a in held)

                def launch():
                    parameters = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
                    sizes = (ctypes.c_uint * 6)(*grid, *block)
                    self.kernel(sizes, ctypes.c_size_t(shared_mem), parameters)

                stream.do(launch)

        def module(code, options):
            defines = tuple(option for option in options if option.startswith("-D"))
            assert options[:2] == ("-std=c++17", "-arch=sm_90a")
            library = compiled(code, (*FLAGS, *defines))
            return SimpleNamespace(get_function=lambda name: Kernel(library, name))

        runtime = SimpleNamespace(
            getDeviceCount=lambda: 1, getDeviceProperties=lambda n: {"name": b"Emulated"},
            CUDARuntimeError=KeyError, memcpyHostToDevice=1, memcpyDeviceToHost=2, memcpyDeviceToDevice=3,
            memcpyAsync=lambda to, source, size, kind, ptr: self.do(lambda: ctypes.memmove(to, source, size)),
        )  # fmt: skip
        device = SimpleNamespace(
            use=lambda: None, compute_capability="90", attributes={"MultiProcessorCount": 132}, id=0,
            mem_info=(self.left, memory),
        )  # fmt: skip
        event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        cuda = SimpleNamespace(
            runtime=runtime, nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)), Device=lambda n: device,
            Stream=lambda non_blocking: self, Event=lambda disable_timing: event, Memory=Memory,
            UnownedMemory=cupy.cuda.UnownedMemory, MemoryPointer=cupy.cuda.MemoryPointer,
        )  # fmt: skip
        self.cupy = SimpleNamespace(
            ndarray=cupy.ndarray, cuda=cuda, RawModule=module, __version__=cupy.__version__
        )
        self.cupyx = SimpleNamespace(empty_pinned=np.empty)
        self.ptr = 7

    def do(self, work):
        work() if self.captured is None else self.captured.append(work)

    def use(self):
        pass

    def synchronize(self):
        assert self.captured is None

    def begin_capture(self):
        self.captured = []

    def end_capture(self):
        work, self.captured = self.captured, None
        return SimpleNamespace(launch=lambda stream: [do() for do in work])


@pytest.fixture
def driver(monkeypatch):
    def start(**options):
        driver = Driver(**options)
        monkeypatch.setitem(sys.modules, "cupy", driver.cupy)
        monkeypatch.setitem(sys.modules, "cupyx", driver.cupyx)
        device_gpu.use(None)
        return driver

    return start


@compiles
def test_training_and_sampling_on_arrays_of_cupy(images, driver):
    """Nothing in a step or around it asks more of CuPy's arrays than they can do without a device."""
    device_gpu.use(Emulator())
    want = recorded(images, 3, "bfloat16")
    driver()
    assert type(device_gpu.backend()) is device_gpu.CuPy and device_gpu.backend().name == "Emulated"
    assert step_by_step(images, 3, "gpu", "bfloat16")[0] == want[0]
    got = recorded(images, 3, "bfloat16")
    assert got[0] == want[0] and same(got[1], want[1])
    (model, opt), labels = new("gpu", "bfloat16"), np.array([1, 2])
    with opt.with_ema():
        x = nd.ddim_sample(model, DIFFUSION, (2, 8, 8, 1), steps=3, eta=1.0, labels=labels)
    assert x.shape == (2, 8, 8, 1) and np.isfinite(x).all()


@compiles
def test_a_run_on_arrays_of_cupy(make, driver):
    driver()
    folder = train.train(make("run", "gpu", steps=4))
    train.train(make("run", "gpu", steps=6))
    run = checkpoint.load_run(folder, device="gpu")
    run.model.save_pretrained(folder / "model")
    again = nd.UNet.from_pretrained(folder / "model", device="gpu")
    assert same(*([m.ctx.to_host(m.params.data)] for m in (run.model, again)))


def test_memory_that_does_not_suffice_is_one_line_after_the_pool_was_emptied(driver):
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    driver(memory=10_000)
    for size in (4096, 8192, 2048):  # the second and third fit once what is free is given back
        assert device_gpu.empty((size,), np.uint8).nbytes == size
    with pytest.raises(nd.NanodiffError, match="20,224 bytes more do not fit"):
        device_gpu.empty((20_000,), np.uint8)
    assert device_gpu.empty((8192,), np.uint8).nbytes == 8192


def test_a_compiler_that_takes_one_architecture_only_makes_no_wgmma(driver):
    found = driver()
    for version, capability in (((12, 8), 80), ((12, 9), 90)):
        device_gpu.use(None)
        found.cupy.cuda.nvrtc = SimpleNamespace(getVersion=lambda v=version: v)
        assert device_gpu.capability() == capability


@compiles
def test_the_limit_of_shared_memory_is_that_of_the_largest_launch(driver):
    driver()
    backend = device_gpu.backend()
    for smem in (1000, 100_000, 60_000):
        backend.load("update_gpu.cu", "zero_grad", smem, ())
    x = device_gpu.empty((4,), np.float32)
    for smem in (100_000, 60_000, 0):
        device_gpu.launch("update_gpu.cu", "zero_grad", (1,), (32,), (x, np.uint64(4)), smem)
    assert not device_gpu.download(x).any()


# ---- a real step, recorded without computing it ----
def cifar10():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from train_step import NETWORKS
    finally:
        sys.path.pop(0)
    return nd.UNetConfig.from_dict(NETWORKS["cifar10"])


@pytest.mark.parametrize(
    "capability, dtype, gigabytes", [(90, "bfloat16", 1.75), (80, "bfloat16", 1.75), (75, "float32", 3.5)]
)
def test_a_cifar10_step_at_batch_128_keeps_to_the_limits(capability, dtype, gigabytes):
    recorder = Recorder(capability)
    device_gpu.use(recorder)
    model = nd.UNet(cifar10(), device="gpu", dtype=None if capability >= 80 else dtype)
    assert model.ctx.compute == dtype and model.params.count == 35_746_307
    opt = nd.Adam(model.params, clip=1.0, ema=0.9999)
    recorder.calls.clear()
    step = graph.Training(
        model, opt, nd.Diffusion(), np.zeros((1000, 32, 32, 3), np.uint8), None, 128, 0
    ).graph
    fullest = check_plan(step.events, step.offsets, step.bytes)
    assert step.bytes <= 1.02 * fullest and step.bytes <= gigabytes * 1e9  # saved activations are most of it
    most = 99 << 10 if capability == 80 else 227 << 10 if capability == 90 else 64 << 10
    for source, kernel, grid, block, args, smem, defines in recorder.calls:
        what = f"{source} {kernel} {grid} {block} {smem} {defines}"
        assert 0 < grid[0] < 2**31 and all(0 < n < 2**16 for n in grid[1:]), what
        threads = int(np.prod(block))
        assert threads % 32 == 0 and 32 <= threads <= 1024 and block[1:] == (1, 1), what
        assert smem <= most and sum(a.nbytes for a in args) <= 4096, what
    count = Counter(kernel for _, kernel, *_ in recorder.calls)
    # 113 convolutions and linear layers: one product forward, two backward (but for dx of the first one);
    # and each of 6 attentions: 2 forward, 5 backward
    assert count["gemm"] == 3 * 113 - 1 + 7 * 6 and len(recorder.calls) <= 920, count
    assert len({(source, defines) for source, *_, defines in recorder.calls}) <= 48  # modules to compile


# ---- what a user meets ----
def test_without_a_gpu_one_line_says_what_was_looked_for(tmp_path):
    import_error = "import sys; sys.modules['cupy'] = None; "  # as if it were not installed
    call = "import nanodiff as nd; nd.UNet(nd.UNetConfig(), device='gpu')"
    for code, fragments in ((import_error + call, ["CuPy", "pip install", "cpu"]), (call, ["'gpu'", "cpu"])):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            pytest.skip("there is a GPU")
        last = done.stderr.splitlines()[-1]
        assert "NanodiffError" in last and all(f in last for f in fragments), done.stderr
    command = [sys.executable, "-m", "nanodiff", "train", "--device", "gpu", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_dtypes_that_do_not_run():
    device_gpu.use(Recorder(capability=75))
    assert nd.UNet(CLASSES, device="gpu").ctx.compute == "float32"
    for device, dtype, text in (
        ("gpu", "bfloat16", "8.0"),
        ("gpu", "float64", "float32 or bfloat16"),
        ("cpu", "bfloat16", "use float32"),
        ("ref", "bfloat16", "float32 or float64"),
    ):
        with pytest.raises(nd.NanodiffError, match=text):
            nd.UNet(CLASSES, device=device, dtype=dtype)


def test_the_wheel_has_every_kernel(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than pyproject.toml asks for")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".git", "*.egg-info", "build", "runs", "pictures")
    )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("nanodiff-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = [p for p in (ROOT / "nanodiff").rglob("*") if p.suffix in (".py", ".cu", ".cuh")]
    assert len([p for p in package if p.suffix != ".py"]) >= 10
    assert not [p for p in package if p.relative_to(ROOT).as_posix() not in inside]
