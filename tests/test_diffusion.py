"""Schedules against reference values, conversions as identities, one step back against DDPM's own
equations."""

import json
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
ALL = ["cosine", "linear", "scaled_linear", "sigmoid", "sigmoid_beta"]


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
    [
        *((s, T) for s in ("cosine", "sigmoid") for T in (1, 2, 50, 1000, 4000)),
        *((s, T) for s in ("linear", "scaled_linear", "sigmoid_beta") for T in (21, 50, 4000)),
    ],
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
        ({"timesteps": 10**7}, "at most 1000000"),
        ({"timesteps": 1, "zero_snr": True, "prediction": "v"}, "at least 2"),
        ({"timesteps": 20, "schedule": "sigmoid_beta"}, "at least 21"),
        ({"zero_snr": True}, "'eps' with zero_snr"),
        ({"betas": (0.1, 0.2)}, "the cosine schedule has none"),
        ({"schedule": "linear", "betas": (0.2, 0.1)}, "0 < first <= last < 1"),
        ({"schedule": "linear", "betas": (0.2, 1)}, "0 < first <= last < 1"),
        ({"schedule": "linear", "betas": 0.1}, "two numbers"),
        ({"variance": "learned"}, "'learned'"),
        ({"schedule": ["linear"]}, "not known"),
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
    assert again.to_dict() == diff.to_dict() and np.array_equal(again.alpha_bar, diff.alpha_bar)
    diff = Diffusion(77, "linear", "v", (0.001, 0.1), zero_snr=True, variance="learned_range")
    again = Diffusion.from_dict(json.loads(json.dumps(diff.to_dict())))
    assert again.to_dict() == diff.to_dict() and np.array_equal(again.alpha_bar, diff.alpha_bar)
    old = {"timesteps": 77, "schedule": "linear", "prediction": "v"}  # what earlier runs wrote
    assert Diffusion.from_dict(old).to_dict() == Diffusion(**old).to_dict()
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


def test_other_schedules():
    diff = Diffusion(1000, "scaled_linear", betas=(1e-4, 0.02))
    assert diff.alpha_bar[-1] == pytest.approx(7.3341e-4, rel=1e-4)
    assert Diffusion(1000, "linear", betas=(1e-4, 0.02)).alpha_bar[-1] == pytest.approx(LINEAR[999], rel=2e-9)
    assert Diffusion(500, "linear", betas=(1e-4, 0.02)).beta[-1] == 0.02  # as it is said, not scaled
    # the sigmoid of Jabri et al. (start -3, end 3, tau 1) at u = (t + 1) / T, up to the cap at the end
    u = (np.arange(1000) + 1) / 1000
    v = 1 / (1 + np.exp(-(-3 + 6 * u)))
    v = (1 / (1 + math.exp(-3)) - v) / (1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(3)))
    sigmoid = Diffusion(1000, "sigmoid")
    assert np.abs(sigmoid.alpha_bar[:-1] - v[:-1]).max() < 1e-12 and 0 < sigmoid.alpha_bar[-1] < 1e-5
    beta = Diffusion(1000, "sigmoid_beta").beta
    assert beta[0] == pytest.approx(1e-4 + 0.0199 / (1 + math.exp(6))) and np.diff(beta).min() > 0
    assert (beta[499] + beta[500]) / 2 == pytest.approx((1e-4 + 0.02) / 2)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("T", [21, 1000])
def test_zero_terminal_snr(schedule, T):
    """The first step stays, the last is pure noise, the roots in between are moved linearly."""
    old, new = Diffusion(T, schedule, "v"), Diffusion(T, schedule, "v", zero_snr=True)
    assert new.alpha_bar[-1] == 0 and new.beta[-1] == 1
    assert new.alpha_bar[0] == pytest.approx(old.alpha_bar[0], rel=1e-12)
    assert (np.diff(new.alpha_bar) < 0).all() and (new.beta > 0).all()
    was, now = np.sqrt(old.alpha_bar), np.sqrt(new.alpha_bar)
    assert np.abs(now / now[0] - (was - was[-1]) / (was[0] - was[-1])).max() < 1e-12
    for eta in (0.0, 1.0):  # the first step is finite and makes what it should
        w0, wx, sigma = new.step_back(T - 1, T - 2, eta)
        assert w0 == pytest.approx(math.sqrt(new.alpha_bar[T - 2])) and wx**2 + sigma**2 == pytest.approx(
            1 - new.alpha_bar[T - 2]
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction):
    diff, t = Diffusion(1000, "cosine", prediction), np.array([0, 200, 500, 900])
    snr = diff.alpha_bar[t] / (1 - diff.alpha_bar[t])
    want = {"eps": np.minimum(5, snr) / snr, "x0": np.minimum(5, snr), "v": np.minimum(5, snr) / (snr + 1)}
    assert diff.loss_weight(t, 5) == pytest.approx(want[prediction], rel=1e-6)
    assert diff.loss_weight(t, 5).dtype == np.float32
    # a weight turns the error of the prediction into min(SNR, 5) times that of x0
    a, s = np.sqrt(diff.alpha_bar[t]), np.sqrt(1 - diff.alpha_bar[t])
    per = diff.x0_weights(a, s)[1] ** 2  # of the squared error of the prediction, in that of x0
    assert diff.loss_weight(t, 5) == pytest.approx(np.minimum(5, snr) * per, rel=1e-6)


def test_deviations_of_ancestral_steps():
    small, large, learned = (
        Diffusion(100, "linear", variance=v) for v in ("fixed_small", "fixed_large", "learned_range")
    )
    for t, p in ((99, 98), (99, 49), (1, 0), (7, 3)):
        assert small.ancestral_sigma(t, p) == small.step_back(t, p, 1.0)[2]
        assert large.ancestral_sigma(t, p) == pytest.approx(
            math.sqrt(1 - large.alpha_bar[t] / large.alpha_bar[p])
        )
        assert learned.ancestral_sigma(t, p, 1.0) == pytest.approx(large.ancestral_sigma(t, p))
        assert learned.ancestral_sigma(t, p, -1.0) == pytest.approx(small.ancestral_sigma(t, p))
    assert large.ancestral_sigma(99, 98) ** 2 == pytest.approx(large.beta[99])
    for diff in (small, large, learned):
        assert diff.ancestral_sigma(5, -1, np.zeros(3)) == 0.0


# ---- the variational bound ----
def bound_arguments(diff, seed=0, t=(0, 1, 50, 99)):
    """Images of bytes, two of them extreme, and a network's answer that is a bit off."""
    rng, t = np.random.default_rng(seed), np.array(t)
    x0 = (rng.integers(0, 256, (len(t), 3, 4, 2)) / 127.5 - 1).astype(np.float32)
    x0[0, 0, 0], x0[0, 0, 1] = -1, 1
    a, s = (w.reshape(-1, 1, 1, 1) for w in diff.scales(t))
    eps = rng.standard_normal(x0.shape).astype(np.float32)
    right = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[diff.prediction]
    pred = right + np.float32(0.02) * rng.standard_normal(x0.shape).astype(np.float32)
    if diff.variance == "learned_range":
        pred = np.concatenate([pred, rng.uniform(-1.5, 1.5, x0.shape).astype(np.float32)], -1)
    return x0, a * x0 + s * eps, pred, t


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_is_the_divergence_of_two_normals(prediction, variance):
    """Against PyTorch's own formula; t = 0 against the normal's distribution function."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    diff = Diffusion(100, "linear", prediction, variance=variance)
    x0, xt, pred, t = bound_arguments(diff)
    bits, _ = diff.bound(x0, xt, pred, t)
    for b, when in enumerate(t):
        now, then = diff.alpha_bar[when], diff.alpha_bar[when - 1] if when else 1.0
        guess, _ = diff.to_x0_eps(
            *(z[b].astype("f8") for z in (xt, pred[..., :2])), math.sqrt(now), math.sqrt(1 - now)
        )
        mean, keep = (
            math.sqrt(then) * diff.beta[when] / (1 - now),
            math.sqrt(1 - diff.beta[when]) * (1 - then) / (1 - now),
        )
        at = max(when, 1)
        small = diff.beta[at] * (1 - diff.alpha_bar[at - 1]) / (1 - diff.alpha_bar[at])
        large = small if when == 0 and variance == "fixed_large" else diff.beta[when]
        f = (
            (pred[b, ..., 2:].astype("f8") + 1) / 2
            if variance == "learned_range"
            else float(variance == "fixed_large")
        )
        sigma = np.sqrt(np.exp(f * np.log(large) + (1 - f) * np.log(small))) * np.ones(x0[b].shape)
        p = torch.distributions.Normal(*map(torch.tensor, (mean * guess + keep * xt[b], sigma)))
        if when:
            q = torch.distributions.Normal(
                torch.tensor(mean * x0[b].astype("f8") + keep * xt[b]), math.sqrt(small)
            )
            want = torch.distributions.kl_divergence(q, p).mean().item() / math.log(2)
            assert bits[b] == pytest.approx(want, rel=1e-9)
        else:
            x = torch.tensor(x0[b].astype("f8"))
            high, low = p.cdf(x + 1 / 255), p.cdf(x - 1 / 255)
            high[x > 0.999], low[x < -0.999] = 1.0, 0.0
            want = -(high - low).clip(1e-12).log().mean().item() / math.log(2)
            assert bits[b] == pytest.approx(want, rel=0.02)  # Page's formula against the true one


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_of_the_bound(prediction):
    """By v alone, against central differences; the mean's half of the network gets none."""
    diff = Diffusion(100, "cosine", prediction, variance="learned_range")
    x0, xt, pred, t = bound_arguments(diff, 1)
    pred = pred.astype(np.float64)
    _, grad = diff.bound(x0, xt, pred, t)
    assert (grad[..., :2] == 0).all() and (grad[..., 2:] != 0).mean() > 0.9
    rng, h = np.random.default_rng(2), 1e-6
    for _ in range(20):
        move = np.zeros_like(pred)
        move[..., 2:] = rng.standard_normal(x0.shape)
        up, down = (diff.bound(x0, xt, pred + side * h * move, t)[0].sum() for side in (1, -1))
        assert (up - down) / (2 * h) == pytest.approx((grad * move).sum(), rel=1e-5, abs=1e-7)


def test_hybrid_loss_and_its_gradient():
    diff = Diffusion(100, "linear", "eps", variance="learned_range")
    x0, xt, pred, t = bound_arguments(diff, 3)
    target = np.random.default_rng(4).standard_normal(x0.shape).astype(np.float32)
    loss, dpred = diff.hybrid_loss(pred, target, x0, xt, t)
    bits, grad = diff.bound(x0, xt, pred, t)
    error = np.square(pred[..., :2].astype("f8") - target)
    assert loss.shape == (1,) and loss[0] == pytest.approx(error.mean() + 0.1 * bits.mean())  # T / 1000 = 0.1
    assert dpred.dtype == np.float32 and dpred.shape == pred.shape
    assert dpred[..., 2:] == pytest.approx(0.1 * grad[..., 2:] / 4, rel=1e-5)
    assert dpred[..., :2] == pytest.approx(2 * (pred[..., :2] - target) / target.size, rel=1e-5)


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
    schedule=st.sampled_from(ALL),
    zero_snr=st.booleans(),
)
def test_a_step_back_keeps_the_process(t, p, eta, schedule, zero_snr):
    """Given the true x0 and eps, the mean and the variance of x_p are those of the forward process at p."""
    if p >= t:
        t, p = p + 1, t - 1
    diff = Diffusion(1000, schedule, "v", zero_snr=zero_snr)
    w0, wx, sigma = diff.step_back(t, p, eta)
    now, then = diff.alpha_bar[t], diff.alpha_bar[p] if p >= 0 else 1.0
    assert w0 + wx * math.sqrt(now) == pytest.approx(math.sqrt(then), rel=1e-12)
    assert wx**2 * (1 - now) + sigma**2 == pytest.approx(1 - then, rel=1e-9, abs=1e-15)
    assert sigma == 0 or eta > 0
