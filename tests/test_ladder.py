"""Every step of bench/ladder/ computes the same convolution."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from nanodiff.kernels import conv_ref
from nanodiff.testing import assert_close

LADDER = Path(__file__).parents[1] / "bench" / "ladder"
STEPS = sorted(path.stem for path in LADDER.glob("conv_*.py"))


@pytest.fixture
def conv(request, monkeypatch):
    """The function of a step; steps import one another by their bare names."""
    monkeypatch.syspath_prepend(str(LADDER))
    return importlib.import_module(request.param).conv


def test_the_steps_are_numbered():
    assert [name.split("_")[1] for name in STEPS] == [str(i) for i in range(1, len(STEPS) + 1)]
    assert len(STEPS) == 8


@pytest.mark.parametrize("conv", STEPS, indirect=True)
@pytest.mark.parametrize("shape", [(2, 7, 5, 16, 32), (1, 9, 11, 48, 16)], ids=str)
def test_a_step_agrees_with_the_definition(conv, shape):
    B, H, W, C, O = shape
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(s, np.float32) for s in ((B, H, W, C), (3, 3, C, O), (O,)))
    want = conv_ref.conv_forward(*(a.astype(np.float64) for a in (x, weight, bias)), pad=(1, 1))
    assert_close(conv(x, weight, bias), want, error=1e-5)
