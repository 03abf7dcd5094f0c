"""Every op of the GPU against its definition, on the emulator: the .cu files, compiled for this machine."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import COMPILER, Emulator, from_bf16, to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff import kernels
from nanodiff.kernels import device_gpu, random_ref
from nanodiff.testing import CASES, WRITTEN, assert_close, returned, run

REF, GPU = kernels.load("ref"), kernels.load("gpu")
OPS = [name for name in vars(REF) if name != "rendition"]
pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="needs g++, to compile the CUDA sources for this machine"
)
drawn = settings(deadline=None, derandomize=True, max_examples=25)

# In bfloat16 mode activations and their gradients are bfloat16, and these arguments still float32:
SINGLE = {"weight", "bias", "emb", "mean", "rstd", "lse", "dweight", "dbias"}
# and these ops see float32 alone: images, noise, times, classes, and the flat buffers
SINGLE_OPS = {
    "time_embedding", "embedding_forward", "embedding_backward", "q_sample", "sample_step", "gather_images",
    "normal", "random_bits", "zero_grad", "squared_norm", "adam_update", "prepare_weights", "cast",
    "conv_prepare", "upconv_prepare",
}  # fmt: skip
BF16_OPS = [op for op in CASES if op not in SINGLE_OPS]
# Of a result stored as bfloat16, rounding alone moves each element by up to 2^-9; twice that leaves room for
# a factor rounded on the way (p and ds of attention). The definition gets the same rounded arguments.
BF16_ERROR = 2.0**-8


@pytest.fixture(autouse=True)
def emulator():
    device_gpu.use(Emulator())
    yield
    device_gpu.use(None)


def names(op):
    return list(inspect.signature(getattr(REF, op)).parameters)


def narrow(op, name, a):
    """Whether an argument is bfloat16 in bfloat16 mode."""
    return op in BF16_OPS and name not in SINGLE and isinstance(a, np.ndarray) and a.dtype == np.float32


def run_gpu(op, arguments, bf16=False):
    """As testing.run: what the op returns, then what it writes into, as float32 arrays of the host.

    With bf16, a list of the dtypes too. Asserts that no other argument was written into.
    """
    device, upload = [], device_gpu.upload
    for name, a in zip(names(op), arguments):
        a = to_bf16(a) if bf16 and narrow(op, name, a) else a
        device.append(upload(a) if isinstance(a, np.ndarray) else a)
    before = [a.tobytes() if isinstance(a, np.ndarray) else a for a in device]
    out = getattr(GPU, op)(*device)
    for name, a, b in zip(names(op), device, before):
        assert name in WRITTEN or not isinstance(a, np.ndarray) or a.tobytes() == b, f"{op} wrote into {name}"
    out = returned(op, out) + [a for name, a in zip(names(op), device) if name in WRITTEN]
    made = [from_bf16(a) if a.dtype == device_gpu.BF16 else device_gpu.download(a) for a in out]
    return (made, [a.dtype for a in out]) if bf16 else made


def agree(op, dims, bf16=False, seed=0):
    arguments = CASES[op].arguments(dims, seed)
    if not bf16:
        got, want = run_gpu(op, arguments), run("ref", op, arguments, np.float64)
        dtypes = [a.dtype for a in got]
    else:
        got, dtypes = run_gpu(op, arguments, True)
        for i, (name, a) in enumerate(zip(names(op), arguments)):
            matrix = name == "weight" and op.startswith(("linear", "conv", "upconv"))  # read in bfloat16
            if narrow(op, name, a) or matrix:
                arguments[i] = from_bf16(to_bf16(a))
        want = run("ref", op, arguments, np.float64)
    assert len(got) == len(want)
    for i, (a, b, dtype) in enumerate(zip(got, want, dtypes)):
        limits = CASES[op].limits(dims)
        if dtype == device_gpu.BF16:
            limits["error"] = max(limits["error"], BF16_ERROR)
        assert_close(a, b, **limits, what=f"result {i} of {op} {dims}")


# ---- the contract ----
@pytest.mark.parametrize("op", OPS)
def test_signatures_are_those_of_the_definition(op):
    ref, gpu = (inspect.signature(getattr(k, op)) for k in (REF, GPU))
    assert ref == gpu


@pytest.mark.parametrize("op", CASES)
def test_float32_is_the_definition(op):
    for dims in CASES[op].shapes:
        agree(op, dims)


@pytest.mark.parametrize("op", BF16_OPS)
def test_bfloat16_is_the_definition_but_for_rounding(op):
    for dims in CASES[op].shapes:
        agree(op, dims, bf16=True)


@pytest.mark.parametrize("op", CASES)
def test_the_order_of_threads_changes_nothing(op):
    for dims in CASES[op].shapes[1:6:2]:
        arguments, bits = CASES[op].arguments(dims), []
        for order in range(4):
            device_gpu.use(Emulator(order))
            results = run_gpu(op, arguments) + (run_gpu(op, arguments, True)[0] if op in BF16_OPS else [])
            bits.append([a.tobytes() for a in results])
        assert all(b == bits[0] for b in bits), f"{op} {dims}"


@pytest.mark.parametrize("op", [op for op in CASES if not op.endswith("conv_prepare")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_so(op, bad):
    """Wherever one bad value makes the definition's result not finite, the GPU's is not finite either."""
    dims = CASES[op].shapes[min(2, len(CASES[op].shapes) - 1)]
    arguments = CASES[op].arguments(dims)
    for i, a in enumerate(arguments):
        if bad == np.inf and op.endswith("_backward") and i > 0:
            continue  # in anything but dout: what a forward made of it would not be finite either
        if isinstance(a, np.ndarray) and a.dtype == np.float32 and a.size:
            spoiled = [b.copy() if isinstance(b, np.ndarray) else b for b in arguments]
            spoiled[i].reshape(-1)[a.size // 2] = bad
            for want, got in zip(run("ref", op, spoiled, np.float64), run_gpu(op, spoiled)):
                if want.dtype.kind == "f":
                    assert not (~np.isfinite(want) & np.isfinite(got)).any(), f"argument {i} of {op} {dims}"


# ---- any size ----
@drawn
@given(B=st.integers(1, 3), H=st.integers(1, 12), W=st.integers(1, 12), G=st.integers(1, 9),
       D=st.sampled_from([1, 2, 3, 4, 8, 16, 17, 40]), silu=st.booleans(),
       offset=st.sampled_from([0, 0, 3, -100]), residual=st.booleans())  # fmt: skip
def test_any_group_norm(B, H, W, G, D, silu, offset, residual):
    if H * W * D < 3:  # one value or two are normalised to constants: nothing is left of them but rounding
        H = 3
    dims = dict(B=B, H=H, W=W, C=G * D, G=G, offset=offset, silu=silu, residual=residual)
    for op in ("groupnorm_forward", "groupnorm_again", "groupnorm_backward"):
        agree(op, dims)


@pytest.mark.parametrize(
    "shape",
    [(2, 32, 32, 128, 32), (1, 40, 41, 16, 2), (2, 3, 3, 1100, 1), (2, 3, 2, 600, 600), (1, 1, 1, 4128, 1)],
)
def test_large_images_and_wide_groups(shape):
    """More pixels than a pass of the threads, and more channels to a group than a block has threads."""
    dims = dict(zip("BHWCG", shape)) | dict(offset=2, silu=1, residual=1)
    for op in ("groupnorm_forward", "groupnorm_again", "groupnorm_backward"):
        if op != "groupnorm_backward" or shape[3] != shape[4]:
            agree(op, dims)
            agree(op, dims, bf16=True)


@drawn
@given(shape=st.lists(st.integers(1, 9), min_size=4, max_size=4), C=st.sampled_from([1, 3, 4, 8, 12, 16, 24]),
       D=st.sampled_from([1, 2, 8, 16]))  # fmt: skip
def test_any_resampling(shape, C, D):
    B, H, W, _ = shape
    for bf16 in (False, True):
        agree("upsample_forward", dict(shape=(B, H, W, C)), bf16)
        agree("upsample_backward", dict(shape=(B, H, W, C)), bf16)
        agree("concat", dict(B=B, H=H, W=W, C=C, D=D), bf16)
        agree("split", dict(B=B, H=H, W=W, C=C, D=D), bf16)


# ---- random numbers ----
def test_a_million_normals_are_the_same_bits():
    for name in random_ref.__all__:
        args = (4, 1 << 18), 123, 7, random_ref.NOISE
        want, got = getattr(random_ref, name)(*args), device_gpu.download(getattr(GPU, name)(*args))
        assert want.dtype == got.dtype and np.array_equal(want.view(np.uint32), got.view(np.uint32))


@drawn
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    purpose=st.integers(0, 1000),
    first=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_counter_and_a_step_on_the_device(shape, seed, step, purpose, first):
    at = device_gpu.upload(np.array([step], np.uint32))
    for name in random_ref.__all__:
        want = getattr(random_ref, name)(tuple(shape), seed, step, purpose, first)
        for s in (step, at):
            got = device_gpu.download(getattr(GPU, name)(tuple(shape), seed, s, purpose, first))
            assert want.dtype == got.dtype and want.shape == got.shape and want.tobytes() == got.tobytes()


def test_dropout_takes_its_step_from_the_device_and_has_the_mask_of_the_definition():
    for shape in ((2, 5, 7, 3), (3, 4, 4, 8)):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        want, step = REF.dropout(x, 0.3, 5, 9, 2), device_gpu.upload(np.array([9], np.uint32))
        for s in (9, step):
            assert np.array_equal(want, device_gpu.download(GPU.dropout(device_gpu.upload(x), 0.3, 5, s, 2)))
            narrow = GPU.dropout(device_gpu.upload(to_bf16(x)), 0.3, 5, s, 2)
            assert np.array_equal(want == 0, from_bf16(device_gpu.download(narrow)) == 0)


# ---- arguments of other types ----
def test_times_and_classes_are_of_any_type_on_the_host_or_the_device():
    table = device_gpu.upload(np.random.default_rng(0).standard_normal((10, 6), np.float32))
    for dtype in (np.float32, np.float64, np.int32, np.int64):
        t = np.array([0, 3, 9, 7], dtype)
        for array in (t, device_gpu.upload(t)):
            got = device_gpu.download(GPU.time_embedding(array, 7, True, 0))
            np.testing.assert_allclose(got, REF.time_embedding(t, 7, True, 0), atol=1e-7)
            if t.dtype.kind == "i":
                got = device_gpu.download(GPU.embedding_forward(array, table))
                assert np.array_equal(got, device_gpu.download(table)[t])
    narrow = GPU.time_embedding(t, 32, False, 1, device_gpu.BF16)
    assert np.array_equal(device_gpu.download(narrow), to_bf16(REF.time_embedding(t, 32, False, 1)))


def test_casts():
    x = np.random.default_rng(0).standard_normal((3, 7, 5), np.float32)
    x.reshape(-1)[:6] = np.nan, np.inf, -np.inf, 0, 1 + 2.0**-8, 1 + 3 * 2.0**-8  # ties go to even
    device = device_gpu.upload(x)
    narrow, wide = GPU.cast(device, "bfloat16"), GPU.cast(device, "float64")
    assert np.array_equal(device_gpu.download(narrow), to_bf16(x))
    assert np.array_equal(from_bf16(to_bf16(x)).reshape(-1)[4:6], [1, 1 + 4 * 2.0**-8])
    assert np.array_equal(device_gpu.download(wide), x.astype(np.float64), equal_nan=True)
    back = device_gpu.download(GPU.cast(narrow, "float32"))
    assert (
        np.array_equal(back, from_bf16(to_bf16(x)), equal_nan=True) and GPU.cast(device, "float32") is device
    )


def test_the_copy_of_the_weights_is_rounded_and_follows_them():
    flat = np.random.default_rng(0).standard_normal(1003, np.float32)
    device = device_gpu.upload(flat)
    GPU.prepare_weights(device, "bfloat16")  # no copy yet: nothing to do
    shadow = device_gpu.register_shadow(device)
    GPU.prepare_weights(device, "bfloat16")
    assert np.array_equal(device_gpu.download(shadow), to_bf16(flat))
    assert device_gpu.bf16_of(device[16:48]).tobytes() == to_bf16(flat[16:48]).tobytes()


# ---- the optimiser ----
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_step_that_is_not_finite_is_skipped(which, bad):
    arguments = CASES["adam_update"].arguments(dict(n=70_001, taken=5, clip=1.0, ema=0.9))
    state = arguments[names("adam_update").index("state")]
    state[which] = bad
    weights, m, v, ema, after = run_gpu("adam_update", arguments)
    kept = [arguments[names("adam_update").index(name)] for name in ("weights", "m", "v", "ema")]
    assert all(np.array_equal(a, b) for a, b in zip((weights, m, v, ema), kept))
    assert after[2:].tolist() == [5, 1] and np.array_equal(after[:2], state[:2], equal_nan=True)


def test_the_learning_rate_may_lie_on_the_device():
    arguments = CASES["adam_update"].arguments(dict(n=501, taken=3, clip=0.5, ema=0.9))
    want = run_gpu("adam_update", arguments)
    at = names("adam_update").index("lr")
    arguments[at] = np.array([arguments[at]], np.float64)
    for a, b in zip(run_gpu("adam_update", arguments), want):
        assert_close(a, b)


def test_gradients_are_added_in_the_same_order_for_any_batch():
    """What an image adds to its own dx, and a forward, do not depend on the images beside it."""
    dims = dict(B=5, H=6, W=5, C=24, G=3, offset=1, silu=1, residual=1)
    arguments = CASES["groupnorm_backward"].arguments(dims)
    one = [a[2:3] if isinstance(a, np.ndarray) and a.shape[:1] == (5,) else a for a in arguments]
    assert np.array_equal(
        run_gpu("groupnorm_backward", arguments)[0][2:3], run_gpu("groupnorm_backward", one)[0]
    )
    x, weight, bias, *rest = CASES["groupnorm_forward"].arguments(dims)
    some = run_gpu("groupnorm_forward", [x, weight, bias, *rest])
    alone = run_gpu("groupnorm_forward", [np.ascontiguousarray(x[2:3]), weight, bias, *rest])
    assert all(np.array_equal(a[2:3], b) for a, b in zip(some, alone))


# ---- what the emulator catches ----
def wrong(op, dims, old, new, bf16=False):
    """Whether a mistake planted in the sources shows, in one order of the threads or another."""
    planted = []

    def edit(text):
        planted.append(old in text)
        return text.replace(old, new)

    for order in range(4):
        device_gpu.use(Emulator(order, edit=edit))
        try:
            agree(op, dims, bf16)
        except AssertionError:
            return True
        finally:
            assert any(planted), f"{old!r} is in no source"
    return False


CONV = dict(B=1, H=8, W=8, C=64, O=64, K=3, stride=1, pad=(1, 1), plus="")
NORM = dict(B=1, H=9, W=7, C=48, G=8, offset=1, silu=1, residual=1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "op, dims, old, new",
    [
        ("conv_forward", CONV, "cp_wait<AHEAD - 1>();", "cp_wait<AHEAD>();"),
        ("conv_forward", CONV, "  wgmma_wait<1>();", "wgmma_wait<2>();"),
        ("conv_forward", CONV, "__syncthreads();  // stage st is here", "//"),
        ("conv_forward", CONV, "__syncthreads();  // now stage st - 1 is done", "//"),
        ("groupnorm_forward", NORM, "int width) {\n  __syncthreads();", "int width) {"),
        ("groupnorm_backward", NORM, "b[c] = q;\n  }\n  __syncthreads();", "b[c] = q;\n  }"),
        ("groupnorm_backward", NORM, "part[warp][lane] = s;\n  __syncthreads();", "part[warp][lane] = s;"),
        ("squared_norm", dict(shape=(1000,)), "= v;\n  __syncthreads();", "= v;"),
        ("add", dict(shape=(2, 5, 7, 3)), "if ((size_t)i < left) p[i]", "p[i]"),  # written behind the end
        ("add", dict(shape=(2, 5, 7, 3)), "(i >= n) return;\n  float x", "(i + N >= n) return;\n  float x"),
    ],
)  # fmt: skip
def test_mistakes_are_caught(op, dims, old, new):
    assert wrong(op, dims, old, new, bf16=op == "conv_forward")


def test_arguments_of_the_host_or_of_another_type_are_refused():
    host = np.zeros(8, np.float32)
    a = device_gpu.upload(host)
    for bad in ((host, a, a, np.uint64(8)), (a, a, a, 8), (a, a, a, 8.0), (a, a, a), (a, a, a, a)):
        with pytest.raises(AssertionError):
            device_gpu.launch("pointwise_gpu.cu", "add", (1,), (256,), bad)


# ---- undefined behaviour ----
def sanitized(code):
    """Run code in a process of its own, where the kernels are compiled with UBSan."""
    code = f"import test_gpu_kernels as t; t.device_gpu.use(t.Emulator(sanitize=True)); {code}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)


def test_no_undefined_behaviour():
    done = sanitized("t.every_op()")
    assert done.returncode == 0, done.stderr[-3000:]


def every_op():
    for op in CASES:
        matrix = op.startswith(
            ("linear", "conv", "upconv", "attention")
        )  # of many modules, a second each to compile
        for dims in CASES[op].shapes[2::9] if matrix else CASES[op].shapes:
            agree(op, dims)
            if op in BF16_OPS:
                agree(op, dims, bf16=True)


def test_undefined_behaviour_is_seen():
    """A vector load from an address that does not suit it."""
    done = sanitized("a = t.device_gpu.upload(t.np.zeros(16, 'f4')); t.GPU.add(a[1:9], a[1:9])")
    assert done.returncode != 0 and "misaligned" in done.stderr
