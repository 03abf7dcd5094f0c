"""Every op of the CPU against its definition, and both against PyTorch; the contract of an op."""

import importlib
import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff import kernels
from nanodiff.testing import CASES, WRITTEN, assert_close, prepare, run, traffic

REF, CPU = kernels.load("ref"), kernels.load("cpu")
OPS = [name for name in vars(REF) if name != "rendition"]
drawn = settings(deadline=None, derandomize=True, max_examples=25)


def agree(op, dims, seed=0):
    """The CPU's results in float32 against the definition's in float64, on the same float32 arguments."""
    arguments = CASES[op].arguments(dims, seed)
    want, got = run("ref", op, arguments, np.float64), run("cpu", op, arguments)
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want)):
        assert a.flags.c_contiguous
        assert_close(a, b, **CASES[op].limits(dims), what=f"result {i} of {op} {dims}")


# ---- the contract ----
def test_both_renditions_have_the_same_ops():
    assert vars(REF).keys() == vars(CPU).keys()
    for family in kernels.FAMILIES:
        ref, cpu = (importlib.import_module(f"nanodiff.kernels.{family}_{r}") for r in ("ref", "cpu"))
        assert set(ref.__all__) == set(cpu.__all__), family


@pytest.mark.parametrize("op", OPS)
def test_both_renditions_have_the_same_signature(op):
    assert inspect.signature(getattr(REF, op)) == inspect.signature(getattr(CPU, op))


def test_every_op_has_a_case_and_every_forward_a_backward():
    assert set(OPS) == set(CASES)
    for op in OPS:
        if op.endswith("_forward"):
            assert op.replace("_forward", "_backward") in OPS


def test_every_definition_is_documented():
    for op in OPS:
        assert getattr(REF, op).__doc__, op
        if op.endswith("_backward"):  # a derivation, not a sentence
            assert len(getattr(REF, op).__doc__) > 60, op


@pytest.mark.parametrize("op", CASES)
def test_shapes_and_dtypes_agree_and_nothing_is_aliased(op):
    """In float32 the definition is float32 throughout; results of the CPU are new arrays."""
    arguments = CASES[op].arguments(CASES[op].shapes[-1])
    ref, cpu = (run(r, op, arguments) for r in ("ref", "cpu"))
    if not op.endswith("conv_prepare"):  # its result is the rendition's own affair
        assert [(a.shape, a.dtype) for a in ref] == [(a.shape, a.dtype) for a in cpu]
    if op == "cast":  # may hand back what it got
        return
    args = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
    prepare(CPU, op, args)
    out = getattr(CPU, op)(*args)
    for a in out if isinstance(out, tuple) else [out]:
        assert not any(isinstance(b, np.ndarray) and np.shares_memory(a, b) for b in args if a is not None)


def test_a_result_does_not_change_when_the_op_runs_again():
    """Memory is used again, but not while somebody refers to it."""
    a, b = (CASES["add"].arguments(dict(shape=(2, 5, 7, 3)), seed) for seed in (1, 2))
    first = CPU.add(*a)
    kept = first.copy()
    second = CPU.add(*b)
    assert not np.shares_memory(first, second) and np.array_equal(first, kept)


# ---- CPU against the definition ----
@pytest.mark.parametrize("op", [op for op in CASES if not op.endswith("conv_prepare")])
def test_cpu_is_ref(op):
    for seed, dims in enumerate(CASES[op].shapes):
        agree(op, dims, seed)


sizes = st.integers(1, 14)
widths = st.sampled_from([1, 3, 5, 8, 16, 17, 24, 32, 48, 64])
plus = st.sampled_from(["", "e", "r", "er"])


@drawn
@given(B=st.integers(1, 3), H=sizes, W=sizes, C=widths, O=widths, K=st.integers(1, 5),
       stride=st.integers(1, 3), before=st.integers(0, 2), after=st.integers(0, 2), plus=plus)  # fmt: skip
def test_any_convolution(B, H, W, C, O, K, stride, before, after, plus):
    K = min(K, min(H, W) + before + after)
    dims = dict(B=B, H=H, W=W, C=C, O=O, K=K, stride=stride, pad=(before, after), plus=plus)
    agree("conv_forward", dims)
    agree("conv_backward", dims)


@drawn
@given(B=st.integers(1, 3), H=st.integers(1, 20), W=st.integers(1, 20), C=st.sampled_from([16, 32, 48, 80]),
       O=st.sampled_from([16, 32, 96]), plus=plus)  # fmt: skip
def test_any_convolution_by_winograd(B, H, W, C, O, plus):
    dims = dict(B=B, H=H, W=W, C=C, O=O, K=3, stride=1, pad=(1, 1), plus=plus)
    agree("conv_forward", dims)
    agree("conv_backward", dims)


@drawn
@given(B=st.integers(1, 3), H=sizes, W=sizes, C=st.integers(1, 40), O=st.integers(1, 40))
def test_any_convolution_of_larger_images(B, H, W, C, O):
    dims = dict(B=B, H=H, W=W, C=C, O=O)
    agree("upconv_forward", dims)
    agree("upconv_backward", dims)


@drawn
@given(shape=st.lists(st.integers(1, 30), min_size=1, max_size=3), C=st.integers(1, 70), O=st.integers(1, 70),
       residual=st.booleans(), stack=st.sampled_from([0, 0, 1, 3]))  # fmt: skip
def test_any_linear(shape, C, O, residual, stack):
    dims = dict(shape=tuple(shape), C=C, O=O, residual=residual and not stack, stack=stack)
    agree("linear_forward", dims)
    agree("linear_backward", dims)


@pytest.mark.parametrize("C, O, stride", [(288, 48, 1), (288, 64, 1), (352, 96, 2)])
def test_input_channels_that_make_sets_of_unequal_size(C, O, stride):  # of the jobs of a weight gradient
    agree("conv_backward", dict(B=3, H=8, W=8, C=C, O=O, K=3, stride=stride, pad=(1, 1), plus=""))
    agree("linear_backward", dict(shape=(200,), C=C, O=O + 433, residual=False, stack=0))


@drawn
@given(B=st.integers(1, 5), H=sizes, W=sizes, G=st.integers(1, 9), D=st.integers(1, 17), silu=st.booleans(),
       offset=st.sampled_from([0, 0, 3, -100]), residual=st.booleans())  # fmt: skip
def test_any_group_norm(B, H, W, G, D, silu, offset, residual):
    if H * W * D < 3:  # one value or two are normalised to constants: nothing is left of them but rounding
        H = 3
    dims = dict(B=B, H=H, W=W, C=G * D, G=G, offset=offset, silu=silu, residual=residual)
    agree("groupnorm_forward", dims)
    agree("groupnorm_backward", dims)


@drawn
@given(B=st.integers(1, 3), N=st.integers(1, 120), heads=st.integers(1, 4), D=st.integers(1, 40),
       scale=st.sampled_from([1, 1, 5, 50]))  # fmt: skip
def test_any_attention(B, N, heads, D, scale):
    dims = dict(B=B, N=N, C=heads * D, heads=heads, scale=scale)
    agree("attention_forward", dims)
    agree("attention_backward", dims)


kinds = st.sampled_from(["silu", "relu", "gelu", "mish"])


@drawn
@given(B=st.integers(1, 3), H=sizes, W=st.integers(1, 40), C=st.integers(1, 70), kind=kinds)
def test_any_modulation(B, H, W, C, kind):
    dims = dict(B=B, H=H, W=W, C=C, kind=kind)
    agree("modulate_forward", dims)
    agree("modulate_backward", dims)


@pytest.mark.parametrize("kind", ["silu", "relu", "gelu", "mish"])
def test_activations_far_out(kind):
    """Where exponentials end, and at what is not a number; each value alone, not the size of all of them."""
    x = np.array(
        [-np.inf, -300, -100, -20.5, -9, -1e-30, 0, 1e-30, 9, 20.5, 100, 300, np.inf, np.nan], np.float32
    )
    with np.errstate(all="ignore"):
        for op, args in (("activation_forward", [x]), ("activation_backward", [np.ones_like(x), x])):
            (want,), (got,) = (
                run(r, op, [*args, kind], d) for r, d in (("ref", np.float64), ("cpu", np.float32))
            )
            assert np.isnan(want[-1]) == (kind != "relu" or op == "activation_forward")
            assert not np.isfinite(got[~np.isfinite(want)]).any()
            inside = slice(1, -2)
            np.testing.assert_allclose(got[inside], want[inside], rtol=1e-6, atol=1e-6)


def test_parameter_gradients_are_added_into():
    for op in (
        "linear_backward",
        "conv_backward",
        "upconv_backward",
        "groupnorm_backward",
        "embedding_backward",
    ):
        for dims in CASES[op].shapes[2:]:
            arguments = CASES[op].arguments(dims)
            names = list(inspect.signature(getattr(REF, op)).parameters)
            at = max(i for i, name in enumerate(names) if name in WRITTEN)
            start, once = arguments[at], run("cpu", op, arguments)[-1]
            arguments[at] = once
            twice = run("cpu", op, arguments)[-1]
            assert_close(twice.astype(np.float64) - once, once.astype(np.float64) - start, 1e-4, what=op)


# ---- values that are not finite ----
def holes(results):
    return [~np.isfinite(a) if a.dtype.kind == "f" else np.zeros(a.shape, bool) for a in results]


@pytest.mark.parametrize("op", [op for op in CASES if not op.endswith("conv_prepare")])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_so(op, bad):
    """Wherever one bad value makes the definition's result not finite, the CPU's is not finite either."""
    dims = CASES[op].shapes[min(2, len(CASES[op].shapes) - 1)]
    arguments = CASES[op].arguments(dims)
    for i, a in enumerate(arguments):
        if bad == np.inf and op.endswith("_backward") and i > 0:
            continue  # in anything but dout: what a forward made of it would not be finite either
        if isinstance(a, np.ndarray) and a.dtype == np.float32 and a.size:
            spoiled = [b.copy() if isinstance(b, np.ndarray) else b for b in arguments]
            spoiled[i].reshape(-1)[a.size // 2] = bad
            for want, got in zip(holes(run("ref", op, spoiled, np.float64)), holes(run("cpu", op, spoiled))):
                assert not (want & ~got).any(), f"argument {i} of {op} {dims}"


@pytest.mark.parametrize("rendition", ["ref", "cpu"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_step_that_is_not_finite_is_skipped(rendition, bad, which):
    arguments = CASES["adam_update"].arguments(dict(n=70_001, taken=5, clip=1.0, ema=0.9))
    names = list(inspect.signature(REF.adam_update).parameters)
    grad, state = arguments[names.index("grad")], arguments[names.index("state")]
    if which == "loss":
        state[0] = bad
    else:
        grad[-1] = bad
        state[1:2] = run(rendition, "squared_norm", [grad])[0]
        assert not np.isfinite(state[1])
    *arrays, after = run(rendition, "adam_update", arguments)
    kept = [arguments[names.index(name)] for name in ("weights", "m", "v", "ema")]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept))
    assert after[2:].tolist() == [5, 1] and np.array_equal(after[:2], state[:2], equal_nan=True)
    state[:2] = 0.5, 1.0  # and the next one is taken
    grad[-1] = 0
    weights, *_, after = run(rendition, "adam_update", arguments)
    assert after[2:].tolist() == [6, 0] and (weights != kept[0]).mean() > 0.9


# ---- PyTorch, and what the table says of costs ----
@pytest.mark.parametrize("op", CASES)
def test_pytorch_agrees(op):
    torch = pytest.importorskip("torch")
    case = CASES[op]
    for dims in case.shapes[::3]:
        arguments = case.arguments(dims)
        tensors = [torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for a in arguments]
        made = case.pytorch(op, *tensors)()
        made = list(made) if isinstance(made, (tuple, list)) else [made]
        if not case.equal:
            continue
        want = run("ref", op, arguments, np.float64)
        if case.leaves:  # gradients alone: without what the op added them to
            names = list(inspect.signature(getattr(REF, op)).parameters)
            starts = [a for a, name in zip(arguments, names) if name in ("dweight", "dbias", "dtable")]
            for i, start in enumerate(starts, len(want) - len(starts)):
                want[i] = want[i] - start.astype(np.float64)
        for got, b in zip(made, want):  # PyTorch has no mean, rstd and lse
            assert_close(got.numpy(), b, **case.limits(dims), what=f"{op} {dims}")


def test_adam_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    arguments = CASES["adam_update"].arguments(dict(n=1000, taken=5, clip=0, ema=0))
    tensors = [torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for a in arguments]
    CASES["adam_update"].pytorch("adam_update", *tensors)()
    weights, m, v, *_ = run("cpu", "adam_update", arguments)
    for got, tensor in ((weights, tensors[0]), (m, tensors[2]), (v, tensors[3])):
        assert_close(got, tensor.numpy())


def test_flops_are_those_that_pytorch_counts():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    for op in ("linear_forward", "conv_forward"):
        for dims in CASES[op].shapes[1:20]:
            tensors = [
                torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in CASES[op].arguments(dims)
            ]
            with FlopCounterMode(display=False) as counter:
                CASES[op].pytorch(op, *tensors)()
            assert counter.get_total_flops() == CASES[op].cost(dims), (op, dims)


def test_traffic_counts_every_array_once():
    arguments = CASES["add"].arguments(dict(shape=(2, 5, 7, 3)))
    assert traffic(arguments, run("cpu", "add", arguments)) == 3 * 4 * 2 * 5 * 7 * 3
