"""Samplers on data whose best prediction is known in closed form, against the papers, and at the edges."""

import contextlib
import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff.context import NanodiffError
from nanodiff.diffusion import PREDICTIONS, Diffusion
from nanodiff.kernels import random_cpu
from nanodiff.kernels.random_ref import SAMPLE, START, normal
from nanodiff.samplers import ddim_invert, ddim_sample, ddpm_sample, dpm_sample, step_list

MEAN, STD = 0.3, 0.2  # of the data: every pixel of x0 is N(MEAN, STD^2) and knows nothing of the others


def gaussian_x0_eps(alpha_bar):
    """((A, B), (A, B)): E[x0 | xt] and E[eps | xt] of the Gaussian data are A xt + B."""
    a, s, variance = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), alpha_bar * STD**2 + 1 - alpha_bar
    x0, eps = a * STD**2 / variance, s / variance
    return (x0, MEAN * (1 - a * x0)), (eps, -eps * a * MEAN)


def oracle(diff):
    """The perfect network for that data: a callable (x, t) -> what `diff.prediction` asks for."""

    def predict(x, t):
        alpha_bar = diff.alpha_bar[t[0]]
        x0, eps = (A * x + B for A, B in gaussian_x0_eps(alpha_bar))
        return {"x0": x0, "eps": eps, "v": math.sqrt(alpha_bar) * eps - math.sqrt(1 - alpha_bar) * x0}[
            diff.prediction
        ]

    return predict


def closed_form(diff, pairs, eta):
    """Mean and variance that DDIM arrives at from pure noise: equation 12 of Song et al. is linear in x."""
    mean, variance = 0.0, 1.0
    for t, p in pairs:
        now, then = diff.alpha_bar[t], diff.alpha_bar[p] if p >= 0 else 1.0
        sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        (A0, B0), (A1, B1) = gaussian_x0_eps(now)
        to_x0, to_eps = math.sqrt(then), math.sqrt(max(1 - then - sigma**2, 0))
        A, B = to_x0 * A0 + to_eps * A1, to_x0 * B0 + to_eps * B1
        mean, variance = A * mean + B, A**2 * variance + sigma**2
    return mean, variance


def assert_moments(x, mean, variance):
    """Within 5 standard errors, and 1e-3 of STD for float32: the first cosine step takes eps times 20,000."""
    n = x.size
    assert abs(x.mean(dtype=np.float64) - mean) < 5 * math.sqrt(variance / n) + 1e-3 * STD
    assert abs(x.std(dtype=np.float64) - math.sqrt(variance)) < 5 * math.sqrt(variance / 2 / n) + 1e-3 * STD


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_gaussian_data_has_the_moments_of_the_closed_form(schedule, prediction):
    diff, shape = Diffusion(100, schedule, prediction), (4, 64, 64, 1)
    for n in (1, 2, 7, 40):
        for eta in (0.0, 0.5, 1.0):
            x = ddim_sample(oracle(diff), diff, shape, n, eta, seed=n, clip=False)
            assert_moments(x, *closed_form(diff, step_list(100, n), eta))
        x = ddpm_sample(oracle(diff), diff, shape, n, seed=n, clip=False)
        assert_moments(x, *closed_form(diff, step_list(100, n), 1.0))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_all_steps_recover_the_data(schedule):
    diff = Diffusion(400, schedule)
    for eta in (0.0, 1.0):  # so many steps leave no bias to speak of, in theory
        mean, variance = closed_form(diff, step_list(400, 400), eta)
        assert mean == pytest.approx(MEAN, abs=0.01) and math.sqrt(variance) == pytest.approx(STD, rel=0.05)
    x = ddpm_sample(oracle(diff), diff, (4, 32, 32, 1), seed=1)
    assert_moments(x, *closed_form(diff, step_list(400, 400), 1.0))


# ---- the sampler of the project that nanodiff grew from ----


def capped_ratio_tables(T):
    """Its cosine schedule: the cap is on the ratio of two alpha_bar, which is 1 - beta, not on beta."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = 1 - np.clip(f[1:] / f[:-1], 0, 0.999)
    return beta, np.cumprod(1 - beta)


def ancestral(x, beta, alpha_bar, variance, network, noise):
    """Algorithm 2 of Ho et al. in float64."""
    for t in range(len(beta) - 1, -1, -1):
        x = (x - beta[t] / np.sqrt(1 - alpha_bar[t]) * network(x, t)) / np.sqrt(1 - beta[t])
        if t > 0:
            x = x + np.sqrt(variance[t]) * noise(t)
    return x


def test_the_cap_on_the_ratio_breaks_ancestral_sampling_and_the_cap_on_beta_does_not():
    """Its last beta is 1: the first ancestral step divides by sqrt(alpha_T) = 0."""
    T, shape, seed = 200, (4, 32, 32, 1), 7
    beta, alpha_bar = capped_ratio_tables(T)
    assert beta.min() == pytest.approx(0.001) and beta[-1] == 1 and alpha_bar[-1] == 0
    inverted = beta[1:] * (1 - alpha_bar[1:]) / (1 - alpha_bar[:-1])  # its variance, upside down

    def eps_of(table):
        def network(x, t):
            A, B = gaussian_x0_eps(table[t])[1]
            return A * x + B

        return network

    def noise(t):
        return normal(shape, seed, t, SAMPLE)

    start = normal(shape, seed, 0, START).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = ancestral(start, beta, alpha_bar, np.append(0, inverted), eps_of(alpha_bar), noise)
    assert not np.isfinite(x).any()

    # capped right, its variance is still upside down: no longer the data, and noisier at the end
    diff = Diffusion(T)
    assert diff.beta[-1] == 0.999 and diff.alpha_bar[-1] > 0
    inverted = diff.beta[1:] * (1 - diff.alpha_bar[1:]) / (1 - diff.alpha_bar[:-1])
    x = ancestral(start, diff.beta, diff.alpha_bar, np.append(0, inverted), eps_of(diff.alpha_bar), noise)
    assert np.isfinite(x).all() and x.std() > 1.02 * STD

    ours = ddpm_sample(oracle(diff), diff, shape, seed=seed, clip=False)
    assert np.isfinite(ours).all()
    assert_moments(ours, *closed_form(diff, step_list(T, T), 1.0))
    assert abs(ours.mean() - MEAN) < 0.02 and abs(ours.std() / STD - 1) < 0.05


# ---- against the papers ----


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ddim_with_eta_1_is_ddpm_is_algorithm_2(schedule, clip):
    """Ho et al.: mean from equation 7 out of the (clipped) x0, variance "fixed small", on the same noise."""
    diff, shape, seed = Diffusion(60, schedule), (2, 8, 8, 3), 3

    def network(x, t):
        return np.tanh(x) * (0.9 + 0.001 * t[0])

    x = normal(shape, seed, 0, START).astype(np.float64)
    for t in range(59, -1, -1):
        beta, now, then = diff.beta[t], diff.alpha_bar[t], diff.alpha_bar[t - 1] if t else 1.0
        x0 = (x - math.sqrt(1 - now) * network(x, [t])) / math.sqrt(now)
        x0 = x0.clip(-1, 1) if clip else x0
        x = math.sqrt(then) * beta / (1 - now) * x0 + math.sqrt(1 - beta) * (1 - then) / (1 - now) * x
        x = x + math.sqrt(beta * (1 - then) / (1 - now)) * normal(shape, seed, t, SAMPLE)
    ddpm = ddpm_sample(network, diff, shape, seed=seed, clip=clip)
    ddim = ddim_sample(network, diff, shape, steps=60, eta=1.0, seed=seed, clip=clip)
    assert np.array_equal(ddpm, ddim)
    # float32 against float64 over 60 steps; without clipping the cosine's first x0 is 20,000 times its eps
    assert np.abs(ddpm - x).max() < 2e-5 * max(1, np.abs(x).max())


# ---- step lists ----


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quadratic"])
@pytest.mark.parametrize("T", [1, 2, 3, 61, 400])
def test_a_list_has_exactly_n_falling_steps_for_every_n(T, spacing):
    for n in range(1, T + 1):
        pairs = step_list(T, n, spacing)
        times = [t for t, _ in pairs]
        assert len(pairs) == n and all(type(t) is int for t in times)
        assert [p for _, p in pairs] == [*times[1:], -1]
        assert T - 1 >= times[0] and times[-1] >= 0 and all(p < t for t, p in pairs)
        if spacing != "leading":
            assert times[0] == T - 1
    assert times == list(range(T - 1, -1, -1))


def test_trailing_is_the_formula_of_lin_et_al():
    for n in (1, 3, 10, 30, 50, 61, 103, 206, 600, 1000):
        expected = np.round(1000 - np.arange(n) * 1000 / n) - 1
        assert [t for t, _ in step_list(1000, n)] == expected.tolist()
    assert step_list(1000, 4) == [(999, 749), (749, 499), (499, 249), (249, -1)]
    assert step_list(10, 3, "leading") == [(6, 3), (3, 0), (0, -1)]
    assert step_list(10, 4, "linspace") == [(9, 6), (6, 3), (3, 0), (0, -1)]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(data=st.data(), T=st.integers(1, 5000))
def test_any_T_and_n(data, T):
    n = data.draw(st.integers(1, T))
    for spacing in ("trailing", "linspace", "quadratic"):
        times = [t for t, _ in step_list(T, n, spacing)]
        assert len(times) == n and times[0] == T - 1 and times[-1] >= 0
        assert all(a > b for a, b in zip(times, times[1:]))


def test_quadratic_steps_are_dense_at_the_end():
    assert [t for t, _ in step_list(1000, 5, "quadratic")] == [999, 562, 250, 62, 0]
    times = [t for t, _ in step_list(1000, 100, "quadratic")]  # in other programs 96 distinct ones
    assert times[:2] == [999, 979] and times[-6:] == [5, 4, 3, 2, 1, 0]


def test_sections_are_those_of_improved_diffusion():
    """Counts per section of [0, T): worked out by hand for T = 12; three sections of 4, both ends taken."""
    assert [t for t, _ in step_list(12, (2, 1, 4))] == [11, 10, 9, 8, 7, 3, 0]
    times = [t for t, _ in step_list(1000, (10, 15, 20))]
    assert len(times) == 45 and times[0] == 999 and times[-1] == 0
    assert [sum(low <= t < high for t in times) for low, high in ((0, 333), (333, 666), (666, 1000))] == [
        10,
        15,
        20,
    ]


def test_a_list_of_times():
    assert step_list(10, None, [9, 4, 2]) == [(9, 4), (4, 2), (2, -1)]
    for steps, spacing in (
        (None, [4, 9]),
        (None, [10, 1]),
        (None, [3, -1]),
        (2, [3]),
        (None, []),
        (None, [1.5]),
    ):
        with pytest.raises(NanodiffError, match="spacing"):
            step_list(10, steps, spacing)
    for steps in ((), (2, 9), (0, 1)):
        with pytest.raises(NanodiffError, match="steps"):
            step_list(10, steps)


def test_the_model_is_asked_once_a_step_for_every_n():
    diff, seen = Diffusion(25), []

    def network(x, t):
        seen.append(t)
        return 0 * x

    for n in range(1, 26):
        for sample in (ddim_sample, ddpm_sample):
            seen.clear()
            x = sample(network, diff, (3, 2, 2, 1), n)
            assert [t.tolist() for t in seen] == [[t] * 3 for t, _ in step_list(25, n)]
            assert x.shape == (3, 2, 2, 1) and x.dtype == np.float32 and np.abs(x).max() <= 1


# ---- variances, thresholds, noise that stops ----


def closed_form_ddpm(diff, pairs, sigma):
    """Mean and variance of ancestral sampling on the Gaussian data with the deviation sigma(t, p)."""
    mean, variance = 0.0, 1.0
    for t, p in pairs:
        w0, wx, _ = diff.step_back(t, p, 1.0)
        A, B = gaussian_x0_eps(diff.alpha_bar[t])[0]
        mean, variance = (w0 * A + wx) * mean + w0 * B, (w0 * A + wx) ** 2 * variance + sigma(t, p) ** 2
    return mean, variance


@pytest.mark.parametrize("n", [5, 100])
def test_fixed_large_and_learned_variances(n):
    """fixed_large: the whole stride's beta. learned_range: v = -1 is the posterior's, +1 beta, 0 their mean
    in the logarithm; beyond, it goes on."""
    large = Diffusion(100, "linear", variance="fixed_large")
    pairs, shape = step_list(100, n), (4, 64, 64, 1)

    def stride(t, p):
        return math.sqrt(1 - large.alpha_bar[t] / large.alpha_bar[p]) if p >= 0 else 0.0

    x = ddpm_sample(oracle(large), large, shape, n, seed=n, clip=False)
    assert_moments(x, *closed_form_ddpm(large, pairs, stride))

    diff = Diffusion(100, "linear", variance="learned_range")

    def network(v):
        return lambda x, t: np.concatenate([oracle(diff)(x, t), np.full_like(x, v)], -1)

    small = ddpm_sample(oracle(diff), Diffusion(100, "linear"), shape, n, seed=n, clip=False)
    assert np.abs(ddpm_sample(network(1), diff, shape, n, seed=n, clip=False) - x).max() < 1e-5
    assert np.abs(ddpm_sample(network(-1), diff, shape, n, seed=n, clip=False) - small).max() < 1e-5
    between = ddpm_sample(network(0), diff, shape, n, seed=n, clip=False)
    assert_moments(
        between,
        *closed_form_ddpm(diff, pairs, lambda t, p: math.sqrt(stride(t, p) * diff.step_back(t, p, 1.0)[2])),
    )


def residual(steps, start=900, **options):
    """What is left of the noise, as a share of what the schedule says, after `steps` steps below `start`.

    The network knows that the image is 0; x is noise alone.
    """
    diff, left = Diffusion(1000, prediction="x0"), {}
    options["callback"] = lambda i, n, t, x, x0: left.setdefault(t, x.std(dtype=np.float64))
    ddim_sample(lambda x, t: 0 * x, diff, (1, 64, 64, 1), 1000, eta=1.0, seed=3, **options)
    t = start - steps + 1  # the step that left time t led to t - 1
    return left[t] / math.sqrt(1 - diff.alpha_bar[t - 1])


@pytest.mark.parametrize("steps, share", [(100, 0.485), (200, 0.309), (400, 0.158), (600, 0.081)])
def test_noise_stop_lets_the_noise_fall_below_the_schedule_and_eta_stop_does_not(steps, share):
    assert residual(steps, noise_stop=900) == pytest.approx(share, rel=0.05)  # 4096 normals: 1.1 %
    assert residual(steps, eta_stop=900) == pytest.approx(1, rel=0.05)
    assert residual(steps) == pytest.approx(1, rel=0.05)


def test_stops_that_never_come_or_come_at_once():
    diff, shape = Diffusion(50), (2, 6, 6, 1)
    full = ddim_sample(oracle(diff), diff, shape, 20, eta=1.0)
    assert np.array_equal(full, ddim_sample(oracle(diff), diff, shape, 20, eta=1.0, eta_stop=-1))
    assert np.array_equal(full, ddim_sample(oracle(diff), diff, shape, 20, eta=1.0, noise_stop=-1))
    still = ddim_sample(oracle(diff), diff, shape, 20, eta=0.0)
    assert np.array_equal(still, ddim_sample(oracle(diff), diff, shape, 20, eta=1.0, eta_stop=50))


def test_thresholds():
    diff, seen = Diffusion(100, prediction="x0"), []

    def watch(i, n, t, x, x0):
        seen.append(x0)

    ramp = np.linspace(-3, 3, 101, dtype=np.float32).reshape(1, 101, 1, 1)
    ddim_sample(lambda x, t: ramp, diff, ramp.shape, 2, callback=watch, clip=2.0)
    assert np.array_equal(seen[0], ramp.clip(-2, 2))
    ddim_sample(lambda x, t: ramp, diff, ramp.shape, 2, callback=watch, dynamic=0.9)
    s = np.quantile(np.abs(ramp), 0.9)
    assert np.abs(seen[2] - ramp.clip(-s, s) / s).max() < 1e-6 and np.abs(seen[2]).max() == 1
    ddim_sample(lambda x, t: ramp / 6, diff, ramp.shape, 2, callback=watch, dynamic=0.9)
    assert np.array_equal(seen[4], ramp / 6)  # a quantile below 1 changes nothing


# ---- second order, and backwards ----


def flow(diff, x, t, p):
    """The exact answer of the probability flow from time t to p, for the Gaussian data."""
    (a, v), (b, w) = ((math.sqrt(ab), ab * STD**2 + 1 - ab) for ab in (diff.alpha_bar[t], diff.alpha_bar[p]))
    return b * MEAN + math.sqrt(w / v) * (x - a * MEAN)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_is_of_second_order(prediction):
    """Down to t = 0 (the step from there to the image has no finite lambda), on steps dense near it, where
    lambda falls fastest."""
    diff, shape = Diffusion(1000, "linear", prediction), (1, 16, 16, 1)

    def error(sampler, n):
        seen = []
        sampler(oracle(diff), diff, shape, n, seed=1, clip=False, spacing="quadratic",
                callback=lambda *step: seen.append(step))  # fmt: skip
        return np.abs(seen[-2][3] - flow(diff, normal(shape, 1, 0, START).astype(np.float64), 999, 0)).max()

    dpm, ddim = ([error(s, n) for n in (25, 50, 100)] for s in (dpm_sample, ddim_sample))
    assert all(d < e / 2.5 for d, e in zip(dpm, ddim)) and dpm[2] < ddim[2] / 10
    assert dpm[0] / dpm[1] > 3 and dpm[1] / dpm[2] > 3  # 4 in the limit; DDIM's 2
    assert 1.5 < ddim[1] / ddim[2] < 2.6


def test_dpm_solver_from_pure_noise_with_zero_snr():
    diff = Diffusion(1000, "linear", "v", zero_snr=True)
    x = dpm_sample(oracle(diff), diff, (4, 32, 32, 1), 30, clip=False, spacing="quadratic")
    assert abs(x.mean() - MEAN) < 0.02 and abs(x.std() / STD - 1) < 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inversion_comes_back(prediction):
    diff, rng = Diffusion(1000, "linear", prediction), np.random.default_rng(0)
    images = (MEAN + STD * rng.standard_normal((2, 8, 8, 1))).astype(np.float32)

    def round_trip(steps, refine):
        noise = ddim_invert(oracle(diff), diff, images, steps, refine=refine)
        back = ddim_sample(oracle(diff), diff, images.shape, steps, clip=False, start=noise)
        return np.linalg.norm(back - images) / np.linalg.norm(images), noise

    errors = [round_trip(n, 1)[0] for n in (20, 50, 200)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05, errors
    exact, noise = round_trip(50, 30)
    assert exact < 1e-4  # fixed points, to float32
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 1) < 0.3


def test_starts_edits_and_guidance():
    diff, shape = Diffusion(100), (2, 4, 4, 1)
    whole, seen = [], []
    ddim_sample(oracle(diff), diff, shape, 10, seed=4, callback=lambda *step: whole.append(step))
    middle, times = whole[3][3], [t for t, _ in step_list(100, 10)][4:]
    rest = ddim_sample(oracle(diff), diff, shape, None, seed=8, spacing=times, start=middle)
    assert np.array_equal(rest, whole[-1][3])  # eta = 0: the seed no longer matters

    def keep(x, p):
        seen.append(p)
        x[:, :2] = 0.5
        return x

    x = ddim_sample(oracle(diff), diff, shape, 10, seed=4, edit=keep)
    assert seen == [p for _, p in step_list(100, 10)] and (x[:, :2] == 0.5).all() and (x[:, 2:] != 0.5).all()

    def classes(x, t, labels=None):
        return oracle(diff)(x, t) + (0 if labels is None else 0.01 * labels.reshape(-1, 1, 1, 1))

    labels = np.array([1, 2])
    got = ddim_sample(classes, diff, shape, 10, labels=labels, guidance=3.0, clip=False)
    want = ddim_sample(classes, diff, shape, 10, labels=3 * labels, clip=False)  # linear in the label here
    assert np.abs(got - want).max() < 1e-4
    plain = ddim_sample(classes, diff, shape, 10, labels=labels, clip=False)
    assert (
        np.abs(ddim_sample(classes, diff, shape, 10, labels=labels, guidance=1, clip=False) - plain).max()
        < 1e-5
    )


# ---- promises ----


@pytest.mark.parametrize("sample", [ddim_sample, ddpm_sample])
def test_a_sample_depends_on_its_seed_and_number_alone(sample):
    diff, options = Diffusion(30), {"eta": 0.7} if sample is ddim_sample else {}

    def draw(B, **more):
        return sample(oracle(diff), diff, (B, 6, 6, 3), 10, **options, **more)

    whole = draw(16, seed=5)
    assert np.array_equal(whole, draw(16, seed=5))
    assert np.array_equal(whole, np.concatenate([draw(1, seed=5, first=k) for k in range(16)]))
    assert np.array_equal(whole, np.concatenate([draw(7, seed=5), draw(9, seed=5, first=7)]))
    assert (np.abs(whole - draw(16, seed=6)) > 1e-3).mean() > 0.9
    assert len(np.unique(whole.reshape(16, -1), axis=0)) == 16


def test_a_network_is_asked_on_its_device_with_frozen_weights_and_gives_the_same_images():
    """A stand-in with the face of a UNet, on the CPU's noise: equal to the plain callable bit for bit."""
    diff = Diffusion(20)
    log = []

    class Network:
        ctx = types.SimpleNamespace(device="cpu", k=random_cpu, to_device=np.asarray, to_host=np.asarray)

        @contextlib.contextmanager
        def frozen(self):
            log.append("open")
            yield
            log.append("closed")

        def predict(self, x, t, labels=None):
            assert log == ["open"] and labels is LABELS and t.shape == (2,)
            return oracle(diff)(x, t).astype(np.float32)

    LABELS = np.array([3, 1])
    x = ddim_sample(Network(), diff, (2, 8, 8, 3), 6, eta=0.5, seed=9, labels=LABELS)
    assert log == ["open", "closed"]
    plain = ddim_sample(lambda x, t, labels: oracle(diff)(x, t), diff, (2, 8, 8, 3), 6, 0.5, 9, labels=LABELS)
    assert np.array_equal(x, plain)


def test_callback_sees_every_step_in_arrays_of_its_own():
    diff, seen = Diffusion(50), []
    x = ddpm_sample(oracle(diff), diff, (2, 4, 4, 1), 5, callback=lambda *step: seen.append(step))
    assert [s[:3] for s in seen] == [(i, 5, t) for i, (t, _) in enumerate(step_list(50, 5))]
    for _, _, _, xt, x0 in seen:
        assert type(xt) is type(x0) is np.ndarray and xt.shape == x0.shape == x.shape
        assert np.abs(x0).max() <= 1
    assert np.array_equal(seen[-1][3], x) and np.array_equal(seen[-1][4], x)
    assert len({s[3].tobytes() for s in seen}) == 5  # none was overwritten by a later step
    # the oracle of the noisiest time knows nothing but the mean
    assert np.abs(seen[0][4] - MEAN).max() < 0.01


def test_clipping_holds_the_image_and_without_it_the_cosine_stays_finite():
    """A network that says 0 to everything: at t = 999 the image it stands for is x / 4.9e-5."""
    diff, seen = Diffusion(1000), []
    x = ddim_sample(lambda x, t: 0 * x, diff, (1, 4, 4, 1), 20, callback=lambda *step: seen.append(step[4]))
    assert np.abs(x).max() <= 1 and all(np.abs(x0).max() <= 1 for x0 in seen)
    x = ddim_sample(lambda x, t: 0 * x, diff, (1, 4, 4, 1), 20, clip=False)
    assert np.isfinite(x).all() and np.abs(x).max() > 1000


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 51}, "1 to 50"),
        ({"steps": 2.0}, "steps = 2.0"),
        ({"steps": True}, "steps = True"),
        ({"eta": -0.1}, "eta = -0.1"),
        ({"eta": 1.5}, "eta = 1.5"),
        ({"eta": math.nan}, "eta = nan"),
        ({"eta": "0"}, "eta = '0'"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed = "),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"first": -1}, "first = -1"),
        ({"first": 2**32 - 1}, "first = "),
        ({"shape": (0, 4, 4, 1)}, "0: must be"),
        ({"shape": (2, 4, -4, 1)}, "-4: must be"),
        ({"shape": ()}, "no samples"),
        ({"shape": (2, 4.0, 4, 1)}, "4.0: must be"),
        ({"spacing": "quad"}, "'quad'"),
        ({"spacing": 3}, "spacing 3"),
        ({"clip": -1}, "clip = -1"),
        ({"dynamic": 1.5}, "dynamic = 1.5"),
        ({"guidance": 2.0}, "guidance = 2.0"),
        ({"start": np.zeros((1, 4, 4, 1))}, "start has shape (1, 4, 4, 1)"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, says):
    def network(x, t):
        raise AssertionError("asked before the arguments were checked")

    with pytest.raises(NanodiffError) as error:
        ddim_sample(network, Diffusion(50), **({"shape": (2, 4, 4, 1), "steps": 5} | arguments))
    assert says in str(error.value) and "\n" not in str(error.value)
    if "eta" not in arguments:
        with pytest.raises(NanodiffError):
            ddpm_sample(network, Diffusion(50), **({"shape": (2, 4, 4, 1), "steps": 5} | arguments))


def test_a_network_that_answers_nonsense_is_named():
    def broken(x, t):
        x = x.copy()
        x[1] = np.nan
        return x

    with pytest.raises(NanodiffError, match=r"1 of 3 samples are not finite \(number 11"):
        ddim_sample(broken, Diffusion(50), (3, 4, 4, 1), 5, first=10)
    with pytest.raises(NanodiffError, match=r"\(3, 4, 4, 1\) with \(3, 4, 4, 2\)"):
        ddim_sample(lambda x, t: np.zeros((3, 4, 4, 2)), Diffusion(50), (3, 4, 4, 1), 5)
