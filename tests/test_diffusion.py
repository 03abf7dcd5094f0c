"""Schedules against reference values, conversions as identities, one step back against DDPM's own
equations."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff.context import NanodiffError
from nanodiff.diffusion import PREDICTIONS, Diffusion

COSINE = {  # t: beta, alpha_bar, for T = 1000
    0: (4.128422482e-05, 0.9999587158),
    1: (4.614175274e-05, 0.9999125759),
    10: (8.987136245e-05, 0.9992789038),
    100: (0.0005318991557, 0.9715756818),
    250: (0.001327223954, 0.8458879865),
    500: (0.003155691442, 0.4922851724),
    750: (0.007579122655, 0.1431786464),
    900: (0.01974185587, 0.02361610879),
    990: (0.1899875421, 0.0001967173801),
    997: (0.5555537567, 9.715044036e-06),
    998: (0.7499993929, 2.428766907e-06),
    999: (0.999, 2.428766907e-09),
}
LINEAR = {0: 0.9999, 100: 0.8951415909, 250: 0.5214230306, 500: 0.07779665837, 750: 0.003300158362}
LINEAR[999] = 4.035829765e-05
SCHEDULES = pytest.mark.parametrize("schedule", ["cosine", "linear"])


def test_cosine_schedule():
    diff = Diffusion(1000, "cosine")
    for t, (beta, alpha_bar) in COSINE.items():  # ten printed digits
        assert diff.beta[t] == pytest.approx(beta, rel=2e-9)
        assert diff.alpha_bar[t] == pytest.approx(alpha_bar, rel=2e-9)


def test_linear_schedule_and_its_scaling():
    diff = Diffusion(1000, "linear")
    assert diff.beta[0] == 1e-4 and diff.beta[-1] == 0.02
    for t, alpha_bar in LINEAR.items():
        assert diff.alpha_bar[t] == pytest.approx(alpha_bar, rel=2e-9)
    for T in (100, 250, 4000):  # the end of the process stays about as noisy
        small = Diffusion(T, "linear")
        assert small.beta[-1] == pytest.approx(0.02 * 1000 / T)
        assert math.log(small.alpha_bar[-1]) == pytest.approx(math.log(LINEAR[999]), rel=0.15)


@pytest.mark.parametrize(
    "schedule, T",
    [*(("cosine", T) for T in (1, 2, 50, 1000, 4000)), *(("linear", T) for T in (21, 50, 4000))],
)
def test_tables_are_sound_and_read_only(schedule, T):
    diff = Diffusion(T, schedule)
    for table in (diff.beta, diff.alpha_bar):
        assert table.shape == (T,) and table.dtype == np.float64
        with pytest.raises(ValueError):
            table[0] = 0.5
    assert (diff.beta > 0).all() and (diff.beta < 1).all()
    assert (np.diff(diff.alpha_bar) < 0).all() and diff.alpha_bar[-1] > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"timesteps": 20, "schedule": "linear"}, "at least 21"),
        ({"timesteps": 0}, "at least 1"),
        ({"timesteps": 10.0}, "10.0"),
        ({"timesteps": True}, "True"),
        ({"schedule": "cubic"}, "'cubic'"),
        ({"prediction": "score"}, "'score'"),
    ],
)
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(NanodiffError, match=says) as error:
        Diffusion(**arguments)
    assert "\n" not in str(error.value)


def test_round_trip_through_a_dict():
    diff = Diffusion(77, "linear", "v")
    again = Diffusion.from_dict(diff.to_dict())
    assert again.to_dict() == diff.to_dict() == {"timesteps": 77, "schedule": "linear", "prediction": "v"}
    assert np.array_equal(again.alpha_bar, diff.alpha_bar)
    with pytest.raises(NanodiffError, match="'gamma'"):
        Diffusion.from_dict({"gamma": 1})


def test_scales_are_float64_rounded_once():
    diff = Diffusion()
    a, s = diff.scales(np.arange(1000))
    assert a.dtype == s.dtype == np.float32
    assert np.array_equal(a, np.sqrt(diff.alpha_bar).astype(np.float32))
    # 1 - alpha_bar in float32 would be off by 5e-4 at t = 0
    assert s[0] == pytest.approx(math.sqrt(1 - diff.alpha_bar[0]), rel=1e-7)
    for t in ([1000], [-1], [0.5]):
        with pytest.raises(NanodiffError, match="0 to 999"):
            diff.scales(np.array(t))


@SCHEDULES
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_right_prediction_gives_back_image_and_noise(schedule, prediction):
    diff, rng = Diffusion(1000, schedule, prediction), np.random.default_rng(0)
    t = np.array([0, 1, 300, 700, 998, 999])
    x0, eps = rng.uniform(-1, 1, (6, 4, 4, 3)), rng.standard_normal((6, 4, 4, 3))
    a, s = np.sqrt(diff.alpha_bar[t]), np.sqrt(1 - diff.alpha_bar[t])
    wide_a, wide_s = a.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
    xt = wide_a * x0 + wide_s * eps
    pred = {"eps": eps, "x0": x0, "v": wide_a * eps - wide_s * x0}[prediction]
    got_x0, got_eps = diff.to_x0_eps(xt, pred, a, s)
    # float64, of which x0 from eps loses a factor 1/a = 20,000 and eps from x0 one of 1/s = 156
    assert np.abs(got_x0 - x0).max() < 1e-10 and np.abs(got_eps - eps).max() < 1e-10
    one_x0, one_eps = diff.to_x0_eps(xt[2], pred[2], float(a[2]), float(s[2]))
    assert np.array_equal(one_x0, got_x0[2]) and np.array_equal(one_eps, got_eps[2])
    x32 = diff.to_x0_eps(xt.astype("f4"), pred.astype("f4"), *diff.scales(t))
    assert x32[0].dtype == x32[1].dtype == np.float32 and np.isfinite(x32[0]).all()


@SCHEDULES
def test_step_back_with_eta_1_is_the_posterior_of_ddpm(schedule):
    """Equations 6 and 7 of Ho et al., in the schedule's own beta, which ends at 0.999 for cosine."""
    diff = Diffusion(1000, schedule)
    for t in (1, 2, 10, 500, 998, 999):
        beta, now, then = diff.beta[t], diff.alpha_bar[t], diff.alpha_bar[t - 1]
        w0, wx, sigma = diff.step_back(t, t - 1, 1.0)
        assert w0 == pytest.approx(math.sqrt(then) * beta / (1 - now), rel=1e-7)
        assert wx == pytest.approx(math.sqrt(1 - beta) * (1 - then) / (1 - now), rel=1e-9)
        assert sigma**2 == pytest.approx(beta * (1 - then) / (1 - now), rel=1e-9)
    assert diff.step_back(0, -1, 1.0) == (1.0, 0.0, 0.0)


def test_posterior_variances_in_print():
    assert Diffusion(1000, "linear").step_back(1, 0, 1.0)[2] ** 2 == pytest.approx(5.4532e-5, rel=1e-4)
    assert Diffusion(1000, "cosine").step_back(1, 0, 1.0)[2] ** 2 == pytest.approx(2.1789e-5, rel=1e-4)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    t=st.integers(0, 999),
    p=st.integers(-1, 998),
    eta=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear"]),
)
def test_a_step_back_keeps_the_process(t, p, eta, schedule):
    """Given the true x0 and eps, the mean and the variance of x_p are those of the forward process at p."""
    if p >= t:
        t, p = p + 1, t - 1
    diff = Diffusion(1000, schedule)
    w0, wx, sigma = diff.step_back(t, p, eta)
    now, then = diff.alpha_bar[t], diff.alpha_bar[p] if p >= 0 else 1.0
    assert w0 + wx * math.sqrt(now) == pytest.approx(math.sqrt(then), rel=1e-12)
    assert wx**2 * (1 - now) + sigma**2 == pytest.approx(1 - then, rel=1e-9, abs=1e-15)
    assert sigma == 0 or eta > 0
