"""Whole trajectories against diffusers' schedulers on the same noise; a test for each place they err."""

import math
import warnings

import numpy as np
import pytest

from nanodiff.context import NanodiffError
from nanodiff.diffusion import Diffusion
from nanodiff.kernels.random_ref import SAMPLE, START, normal
from nanodiff.samplers import ddim_sample, ddpm_sample, dpm_sample, step_list

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

SHAPE, SEED = (2, 6, 5, 3), 11
THEIRS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2",
          "sigmoid_beta": "sigmoid"}  # fmt: skip
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def network(x, t):
    """Some smooth function of both, bounded as a prediction is."""
    return np.tanh(1.3 * x + 0.2).astype(np.float32) * np.float32(0.9 + 1e-4 * float(np.ravel(t)[0]))


def scheduler(name, diff, **changes):
    ends = dict(beta_start=diff.betas[0], beta_end=diff.betas[1]) if diff.betas else {}
    settings = dict(
        num_train_timesteps=diff.timesteps, beta_schedule=THEIRS[diff.schedule],
        prediction_type=PREDICTIONS[diff.prediction], rescale_betas_zero_snr=diff.zero_snr, clip_sample=False,
    )  # fmt: skip
    return getattr(diffusers, f"{name}Scheduler")(**settings | ends | changes)


def noise(t):
    return torch.from_numpy(normal(SHAPE, SEED, int(t), SAMPLE))


def run(theirs, times=None, noisy=False, **step):
    """The scheduler's own loop, from our noise, drawing our noise."""
    x = torch.from_numpy(normal(SHAPE, SEED, 0, START))
    for t in theirs.timesteps if times is None else times:
        pred = torch.from_numpy(network(x.numpy(), int(t)))
        more = {"variance_noise": noise(t)} if noisy else {}
        x = theirs.step(pred, int(t), x, **step, **more).prev_sample
    return x.numpy()


def draw_our_noise(monkeypatch, times):
    asked = iter([t for t in times if t > 0])
    draw = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(draw, lambda *a, **k: noise(next(asked)))


def close(a, b, error=2e-4):
    """Their tables are float32, and 1 - alpha_bar loses three digits at small t (see below): 2e-4."""
    return np.linalg.norm(a - b) <= error * np.linalg.norm(b)


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", list(THEIRS))
def test_tables(schedule, zero_snr, T):
    betas = None if schedule == "cosine" else (1e-4, 0.02)
    diff = Diffusion(T, schedule, "v", betas, zero_snr)
    for name in ("DDPM", "DDIM") if schedule != "sigmoid_beta" else ("DDPM",):  # DDIM has not got it
        theirs = scheduler(name, diff).alphas_cumprod.double().numpy()
        # a cosine in float32 is good to 6e-8 near 1, and T of them are multiplied; the cap of beta,
        # 1 - 0.999, keeps five digits
        assert np.abs(theirs - diff.alpha_bar).max() < 2e-5
        assert np.abs(theirs[:-1] / diff.alpha_bar[:-1] - 1).max() < 1e-3


@pytest.mark.parametrize("n", [7, 50, 1000])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_ddpm(prediction, variance, n, monkeypatch):
    """All of their spacings: their DDPM takes the previous step from its list, as we do."""
    diff = Diffusion(1000, "linear", prediction, (1e-4, 0.02), variance=variance)
    spacings = ("trailing", "leading", "linspace") if n < 1000 else ("trailing",)
    for spacing in spacings:
        theirs = scheduler("DDPM", diff, variance_type=variance, clip_sample=True, timestep_spacing=spacing)
        theirs.set_timesteps(n)
        assert [int(t) for t in theirs.timesteps] == [t for t, _ in step_list(1000, n, spacing)]
        draw_our_noise(monkeypatch, theirs.timesteps)
        ours, got = ddpm_sample(network, diff, SHAPE, n, SEED, spacing=spacing), run(theirs)
        last = int(theirs.timesteps[-1])
        if last and variance == "fixed_large":
            # Wrong there: a last step that does not leave t = 0 still adds noise, of the whole last stride.
            # (With fixed_small too, of variance 1e-20.)
            assert not close(ours, got)
            got = got - math.sqrt(1 - diff.alpha_bar[last]) * noise(last).numpy()
        assert close(ours, got), spacing


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_ddim(prediction, eta):
    """On the step lists for which their previous step, t - T // n, is right."""
    diff = Diffusion(1000, "linear", prediction, (1e-4, 0.02))
    for n, spacing in ((10, "leading"), (50, "leading"), (30, "leading"), (10, "trailing"), (50, "trailing")):
        for clip in (False, True):
            theirs = scheduler("DDIM", diff, timestep_spacing=spacing, clip_sample=clip)
            theirs.set_timesteps(n)
            assert [int(t) for t in theirs.timesteps] == [t for t, _ in step_list(1000, n, spacing)]
            ours = ddim_sample(network, diff, SHAPE, n, eta, SEED, clip, spacing=spacing)
            # use_clipped_model_output: the noise derived anew from the clipped image, as we always do
            got = run(theirs, noisy=True, eta=eta, use_clipped_model_output=clip)
            assert close(ours, got), (n, spacing, clip)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr(prediction):
    diff = Diffusion(1000, "scaled_linear", prediction, (0.00085, 0.012), zero_snr=True)
    theirs = scheduler("DDIM", diff, timestep_spacing="trailing")
    theirs.set_timesteps(25)
    ours = ddim_sample(network, diff, SHAPE, 25, 0.0, SEED, clip=False)
    assert close(ours, run(theirs), 1e-3)


def test_dynamic_thresholding():
    diff = Diffusion(1000, "linear", "eps", (1e-4, 0.02))
    theirs = scheduler(
        "DDIM", diff, timestep_spacing="trailing", thresholding=True, dynamic_thresholding_ratio=0.9,
        sample_max_value=1e9,
    )  # fmt: skip
    theirs.set_timesteps(20)
    ours = ddim_sample(network, diff, SHAPE, 20, 0.0, SEED, dynamic=0.9)
    got = run(theirs, use_clipped_model_output=True)
    assert close(ours, got, 1e-3)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_dpm_solver(prediction):
    diff = Diffusion(1000, "linear", prediction, (1e-4, 0.02))
    for n in (1, 2, 10, 25):
        theirs = diffusers.DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTIONS[prediction], final_sigmas_type="zero",
            algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", timestep_spacing="trailing",
        )  # fmt: skip
        theirs.set_timesteps(n)
        times = [int(t) for t in theirs.timesteps]
        ours = dpm_sample(network, diff, SHAPE, None, SEED, clip=False, spacing=times)
        assert close(ours, run(theirs, times), 1e-3), n


# ---- where they are wrong ----


def steps_of(name, n, spacing):
    theirs = scheduler(name, Diffusion(1000, "linear", betas=(1e-4, 0.02)), timestep_spacing=spacing)
    theirs.set_timesteps(n)
    return [int(t) for t in theirs.timesteps], theirs


@pytest.mark.parametrize(
    "n, spacing, wrong", [(10, "linspace", 9), (50, "linspace", 19), (30, "trailing", 10)]
)
def test_their_ddim_steps_to_times_that_are_not_the_next(n, spacing, wrong):
    """The previous step is t - T // n, whatever the list says; ours is the next of the list."""
    times, _ = steps_of("DDIM", n, spacing)
    theirs = [t - 1000 // n for t in times]
    ours = step_list(1000, n, spacing)
    assert [t for t, _ in ours] == times and [p for _, p in ours] == [*times[1:], -1]
    assert sum(a != b for a, b in zip(theirs[:-1], times[1:])) >= wrong
    diff = Diffusion(1000, "linear", betas=(1e-4, 0.02))

    def oracle(x, t):
        """The noise in x, if the image is 0.5 everywhere."""
        a, s = math.sqrt(diff.alpha_bar[t[0]]), math.sqrt(1 - diff.alpha_bar[t[0]])
        return ((x - a * 0.5) / s).astype(np.float32)

    _, scheduler = steps_of("DDIM", n, spacing)
    x, level = torch.from_numpy(normal(SHAPE, SEED, 0, START)), []
    for t in times[:-1]:
        x = scheduler.step(torch.from_numpy(oracle(x.numpy(), [t])), t, x).prev_sample
        level.append(float((x - 0.5).abs().mean()))
    assert np.isfinite(level).all()
    seen = []
    ddim_sample(oracle, diff, SHAPE, n, 0.0, SEED, clip=False, spacing=spacing,
                callback=lambda i, n, t, x, x0: seen.append(x))  # fmt: skip
    for (_, p), x in zip(ours[:-1], seen):  # with the right noise each x is a x0 + s noise of its own time
        start = normal(SHAPE, SEED, 0, START) - math.sqrt(diff.alpha_bar[999]) * 0.5
        want = (
            math.sqrt(diff.alpha_bar[p]) * 0.5
            + math.sqrt(1 - diff.alpha_bar[p]) / math.sqrt(1 - diff.alpha_bar[999]) * start
        )
        assert np.abs(x - want).max() < 1e-4


def test_their_trailing_list_is_sometimes_one_too_long_and_ends_below_zero():
    wrong = []
    for n in range(1, 1001):
        times = np.round(np.arange(1000, 0, -1000 / n)).astype(int) - 1  # their formula
        if len(times) != n or times[-1] < 0:
            wrong.append(n)
    assert len(wrong) == 62 and wrong[:5] == [61, 103, 121, 122, 201]
    times, _ = steps_of("DDIM", 61, "trailing")
    assert len(times) == 62 and times[-1] == -1
    for n in wrong:
        times = [t for t, _ in step_list(1000, n)]
        assert len(times) == n and times[-1] >= 0


def test_their_leading_list_never_visits_the_noisiest_levels():
    times, _ = steps_of("DDIM", 30, "leading")
    assert times[0] == 957 == step_list(1000, 30, "leading")[0][0]  # what the name means: not our default
    assert step_list(1000, 30)[0][0] == 999


def test_their_fixed_large_log_is_nan():
    diff = Diffusion(1000, "linear", betas=(1e-4, 0.02), variance="fixed_large")
    theirs = scheduler("DDPM", diff, variance_type="fixed_large_log")
    theirs.set_timesteps(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = theirs.step(torch.zeros(SHAPE), 900, torch.zeros(SHAPE)).prev_sample
    assert torch.isnan(x).all()
    x = ddpm_sample(network, diff, SHAPE, 10, SEED)
    assert np.isfinite(x).all()


def test_they_accept_eps_without_any_signal():
    """At alpha_bar = 0 an eps says nothing of the image: theirs is a division by 0. Refused here."""
    theirs = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    theirs.set_timesteps(10)
    with torch.no_grad():
        x = theirs.step(torch.ones(SHAPE) * 0.5, 999, torch.ones(SHAPE)).pred_original_sample
    assert not torch.isfinite(x).all() or x.abs().max() > 1e3
    with pytest.raises(NanodiffError, match="zero_snr"):
        Diffusion(1000, "linear", "eps", zero_snr=True)


def test_their_tables_lose_digits_near_the_image():
    """1 - alpha_bar at t = 0, cosine: 4.1284e-5; the subtraction in float32 leaves 5e-4 of error."""
    theirs = scheduler("DDPM", Diffusion(1000, "cosine")).alphas_cumprod
    got, exact = float(1 - theirs[0]), 1 - Diffusion(1000, "cosine").alpha_bar[0]
    assert exact == pytest.approx(4.128422482e-05, rel=1e-9) and abs(got / exact - 1) > 3e-4


def test_their_ddim_keeps_the_noise_from_before_clipping():
    """Their default. With the noise derived anew x stays consistent: a clipped x0 and its own noise."""
    diff = Diffusion(1000, "linear", "eps", (1e-4, 0.02))
    theirs = scheduler("DDIM", diff, timestep_spacing="trailing", clip_sample=True)
    theirs.set_timesteps(10)
    ours = ddim_sample(network, diff, SHAPE, 10, 0.0, SEED)
    assert not close(ours, run(theirs), 0.05)
    assert close(ours, run(theirs, use_clipped_model_output=True))
