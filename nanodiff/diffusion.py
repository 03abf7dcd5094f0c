"""The forward process and what follows from it: schedules, parameterisations, one step back. In float64.

    xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,    alpha_bar_t = prod_{s <= t} (1 - beta_s)

t = 0 .. T-1 is what the network is told; "t = -1" is the clean image, alpha_bar_{-1} = 1. DDPM: Ho, Jain
and Abbeel 2020 (arXiv:2006.11239). DDIM: Song, Meng and Ermon 2020 (arXiv:2010.02502).
"""

import math

import numpy as np

from nanodiff.context import NanodiffError


def linear_beta(T):
    """beta from 1e-4 to 0.02 (DDPM, section 4) at T = 1000; for another T both ends times 1000 / T, which
    keeps the noise at the end of the process. Needs T > 20: beta must stay below 1."""
    return np.linspace(1e-4, 0.02, T) * (1000 / T)


def cosine_beta(T):
    """Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17: alpha_bar_t = f(t+1) / f(0). The cap of 0.999
    is on beta, and alpha_bar is made of the capped beta: without it the last alpha_bar would be 0."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


SCHEDULES = {"cosine": cosine_beta, "linear": linear_beta}
PREDICTIONS = ("eps", "x0", "v")


class Diffusion:
    """A noise schedule over T = `timesteps` steps and what the network predicts.

    timesteps   how many noise levels, at least 1 (linear: at least 21)
    schedule    "cosine" or "linear"
    prediction  "eps" the noise, "x0" the image, or "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
                (Salimans and Ho 2022, arXiv:2202.00512)

    beta, alpha_bar   float64 (T,), read-only; alpha_bar falls strictly and stays above 0
    """

    def __init__(self, timesteps=1000, schedule="cosine", prediction="eps"):
        if schedule not in SCHEDULES:
            raise NanodiffError(f"schedule {schedule!r} is not known; use one of {', '.join(SCHEDULES)}")
        if prediction not in PREDICTIONS:
            raise NanodiffError(
                f"prediction {prediction!r} is not known; use one of {', '.join(PREDICTIONS)}"
            )
        least = 21 if schedule == "linear" else 1
        if not isinstance(timesteps, (int, np.integer)) or isinstance(timesteps, bool) or timesteps < least:
            raise NanodiffError(
                f"timesteps = {timesteps!r}: the {schedule} schedule needs an integer of at least {least}"
            )
        self.timesteps, self.schedule, self.prediction = int(timesteps), schedule, prediction
        self.beta = SCHEDULES[schedule](self.timesteps)
        self.alpha_bar = np.cumprod(1 - self.beta)
        for table in (self.beta, self.alpha_bar):
            table.setflags(write=False)

    def scales(self, t):  # (B,) ints -> (B,), (B,) float32
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), computed in float64."""
        t = np.asarray(t)
        if t.dtype.kind not in "iu" or t.size and (t.min() < 0 or t.max() >= self.timesteps):
            raise NanodiffError(f"t = {t}: must be integers from 0 to {self.timesteps - 1}")
        alpha_bar = self.alpha_bar[t]
        return np.sqrt(alpha_bar).astype(np.float32), np.sqrt(1 - alpha_bar).astype(np.float32)

    def x0_weights(self, a, s):
        """(wx, wp) with x0 = wx xt + wp prediction; a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t)."""
        return {"eps": (1 / a, -s / a), "x0": (0 * a, 1 + 0 * a), "v": (a, -s)}[self.prediction]

    def eps_weights(self, a, s):
        """(wx, wp) with eps = wx xt + wp prediction."""
        return {"eps": (0 * a, 1 + 0 * a), "x0": (1 / s, -a / s), "v": (s, a)}[self.prediction]

    def to_x0_eps(self, xt, pred, a, s):  # (B,...), (B,...), (B,), (B,) -> (B,...), (B,...)
        """The image and the noise that a prediction stands for. a, s as from `scales`, or two numbers.

        All arrays of one device. At the noisy end of the cosine schedule a is 5e-5: there an error in a
        predicted eps is 20,000 times as large in x0, which is why samplers clip x0.
        """
        if getattr(a, "ndim", 0):
            a, s = (w.reshape(-1, *[1] * (xt.ndim - 1)) for w in (a, s))
        (xx, xp), (ex, ep) = self.x0_weights(a, s), self.eps_weights(a, s)
        return xx * xt + xp * pred, ex * xt + ep * pred

    def step_back(self, t, p, eta):
        """(w0, wx, sigma) of the step from time t to an earlier p: x_p = w0 x0 + wx x_t + sigma z, floats.

        DDIM (equations 12 and 16):
            x_p = sqrt(alpha_bar_p) x0 + sqrt(1 - alpha_bar_p - sigma^2) eps + sigma z
            sigma = eta sqrt((1 - alpha_bar_p) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_p).
        Put in here is eps = (x_t - sqrt(alpha_bar_t) x0) / sqrt(1 - alpha_bar_t), so that a clipped x0
        never meets the eps from before clipping. eta = 1 is DDPM's posterior q(x_p | x_t, x0) (equations 6
        and 7), with the variance called "fixed small". p = -1 gives x_p = x0.
        """
        now, then = self.alpha_bar[t], self.alpha_bar[p] if p >= 0 else 1.0
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        wx = math.sqrt(max(1 - then - variance, 0.0)) / math.sqrt(1 - now)  # rounding may fall below 0
        return math.sqrt(then) - math.sqrt(now) * wx, wx, math.sqrt(variance)

    def to_dict(self):
        """What makes this object, as JSON knows it."""
        return {"timesteps": self.timesteps, "schedule": self.schedule, "prediction": self.prediction}

    @classmethod
    def from_dict(cls, d):
        """The inverse of `to_dict`; what is missing takes its default."""
        unknown = set(d) - {"timesteps", "schedule", "prediction"}
        if unknown:
            raise NanodiffError(
                f"diffusion setting {sorted(unknown)[0]!r} is not known; use timesteps, schedule, prediction"
            )
        return cls(**d)
