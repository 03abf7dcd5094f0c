"""Bits per dimension where the right answer is known."""

import math

import numpy as np
import pytest

from nanodiff.context import NanodiffError
from nanodiff.diffusion import Diffusion
from nanodiff.metrics import bits_per_dim

STD = 0.3


def gaussian(diff):
    """The perfect network for pixels that are N(0, STD^2): E[x0 | xt]."""

    def predict(x, t):
        a2 = diff.alpha_bar[t].reshape(-1, 1, 1, 1)
        return np.sqrt(a2) * STD**2 / (a2 * STD**2 + 1 - a2) * x

    return predict


def test_a_network_that_knows_the_image_needs_no_bits_for_it():
    """With the posterior's own variance every divergence is 0; the last step is sure of its bin."""
    diff = Diffusion(200, "linear", "x0")
    image = np.float32(np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)) / 127.5 - 1)
    found = bits_per_dim(lambda x, t: image, diff, image)
    assert len(found["terms"]) == 200 and [t for t, _, _ in found["terms"]] == list(range(200))
    assert all(bits == pytest.approx(0, abs=1e-9) for t, bits, _ in found["terms"] if t)
    # at t = 0 the deviation is that of the posterior at t = 1, 0.016; the bin is +- 0.0039
    assert found["total"] == pytest.approx(found["last"] + found["prior"])
    assert found["prior"] == pytest.approx(diff.prior_bits(image)[0]) and found["prior"] < 1e-3


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_gaussian_data(variance):
    """E (x0 - E[x0 | xt])^2 = STD^2 (1 - alpha_bar) / variance of xt: every term in closed form."""
    diff, rng = Diffusion(100, "linear", "x0", variance=variance), np.random.default_rng(1)
    images = (STD * rng.standard_normal((64, 8, 8, 1))).clip(-1, 1).astype(np.float32)
    found = bits_per_dim(gaussian(diff), diff, images, clip=False)
    ab, want = diff.alpha_bar, 0.0
    for t in range(1, 100):
        beta, now, then = diff.beta[t], ab[t], ab[t - 1]
        small = beta * (1 - then) / (1 - now)
        sigma2 = small if variance == "fixed_small" else beta
        gap = then * beta**2 / (1 - now) ** 2 * STD**2 * (1 - now) / (now * STD**2 + 1 - now)
        kl = (math.log(sigma2 / small) - 1 + small / sigma2 + gap / sigma2) / 2
        want += kl / math.log(2)
        if t in (1, 10, 99):  # 4096 values: 2.2 % of a squared normal, times 3
            assert found["terms"][t][1] == pytest.approx(kl / math.log(2), rel=0.07)
    between = sum(bits for t, bits, _ in found["terms"] if t)
    assert between == pytest.approx(want, rel=0.03)
    # the data's own entropy in bins of 2/255 is below; how far depends on T and on the variance
    entropy = math.log2(STD * math.sqrt(2 * math.pi * math.e) * 255 / 2)
    assert entropy < found["total"] < entropy + {"fixed_small": 2, "fixed_large": 0.6}[variance]


def test_few_times_estimate_the_sum():
    """Unbiased: the mean over seeds comes near the sum over all t; every stratum stands for its times."""
    diff, rng = Diffusion(100, "linear", "x0"), np.random.default_rng(2)
    images = (STD * rng.standard_normal((16, 8, 8, 1))).clip(-1, 1).astype(np.float32)
    exact = bits_per_dim(gaussian(diff), diff, images)
    few = [bits_per_dim(gaussian(diff), diff, images, times=8, seed=s) for s in range(12)]
    assert all(sum(w for _, _, w in f["terms"]) == 100 and len(f["terms"]) == 9 for f in few)
    totals = np.array([f["total"] for f in few])
    assert abs(totals.mean() - exact["total"]) < 4 * totals.std(ddof=1) / math.sqrt(12) + 0.01


def test_an_image_counts_the_same_in_any_batch():
    diff = Diffusion(50, "cosine", "x0")
    images = np.float32(np.random.default_rng(3).integers(0, 256, (5, 4, 4, 1)) / 127.5 - 1)
    one, two = (bits_per_dim(gaussian(diff), diff, images, 10, seed=4, batch=b) for b in (2, 5))
    assert one["total"] == pytest.approx(two["total"], rel=1e-12)
    assert one["error"] == pytest.approx(two["error"], rel=1e-9)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"images": np.zeros((2, 4, 4), np.float32)}, "must be float32"),
        ({"images": np.full((2, 4, 4, 1), 3, np.float32)}, "in \\[-1, 1\\]"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8)}, "uint8"),
        ({"times": 0}, "times = 0"),
        ({"times": 50}, "1 to 49"),
        ({"batch": 0}, "batch = 0"),
    ],
)
def test_bad_arguments(changes, says):
    diff = Diffusion(50, "cosine", "x0")
    with pytest.raises(NanodiffError, match=says):
        bits_per_dim(gaussian(diff), diff, **{"images": np.zeros((2, 4, 4, 1), np.float32)} | changes)
