"""The forward process and what follows from it: schedules, parameterisations, one step back, the variational
bound. In float64.

    xt = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps,    alpha_bar_t = prod_{s <= t} (1 - beta_s)

t = 0 .. T-1 is what the network is told; "t = -1" is the clean image, alpha_bar_{-1} = 1. DDPM: Ho, Jain
and Abbeel 2020 (arXiv:2006.11239). DDIM: Song, Meng and Ermon 2020 (arXiv:2010.02502).
"""

import math

import numpy as np

from nanodiff.context import NanodiffError

CAP = 0.999  # of beta, where alpha_bar would reach 0


def linear_beta(T, low, high):
    """Ho et al. 2020, section 4: evenly from 1e-4 to 0.02 at T = 1000."""
    return np.linspace(low, high, T)


def scaled_linear_beta(T, low, high):
    """Rombach et al. 2022 (arXiv:2112.10752): sqrt(beta) grows evenly."""
    return np.linspace(math.sqrt(low), math.sqrt(high), T) ** 2


def sigmoid_beta(T, low, high):
    """Xu et al. 2022 (arXiv:2203.02923): beta itself along a sigmoid of -6 .. 6. diffusers' "sigmoid"."""
    return low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, T)))


def cosine_beta(T):
    """Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 17: alpha_bar_t = f(t+1) / f(0). The cap is on
    beta, and alpha_bar is made of the capped beta: without it the last alpha_bar would be 0."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], CAP)


def sigmoid_alpha_bar(T):
    """Jabri et al. 2022 (arXiv:2212.11972), algorithm 1 with start -3, end 3, tau 1: alpha_bar falls along a
    sigmoid from 1 to 0. Capped as the cosine schedule is."""
    f = 1 / (1 + np.exp(np.linspace(-3, 3, T + 1)))
    f = (f - f[-1]) / (f[0] - f[-1])
    return np.minimum(1 - f[1:] / f[:-1], CAP)


SCHEDULES = {
    "cosine": cosine_beta, "linear": linear_beta, "scaled_linear": scaled_linear_beta,
    "sigmoid": sigmoid_alpha_bar, "sigmoid_beta": sigmoid_beta,
}  # fmt: skip
ENDS = ("linear", "scaled_linear", "sigmoid_beta")  # schedules with a first and a last beta
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Diffusion:
    """A noise schedule over T = `timesteps` steps and what the network predicts.

    timesteps   how many noise levels, at least 1
    schedule    "cosine", "linear", "scaled_linear", "sigmoid" (of alpha_bar) or "sigmoid_beta"
    prediction  "eps" the noise, "x0" the image, or "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
                (Salimans and Ho 2022, arXiv:2202.00512)
    betas       (first, last) of the schedules that have them, taken as they are. None: 1e-4 and 0.02, both
                times 1000 / T, which keeps the noise at the end (T must then be above 20: beta < 1)
    zero_snr    rescale, so that the last step is pure noise, alpha_bar = 0 (Lin et al. 2023,
                arXiv:2305.08891, algorithm 1). Predicting eps is then refused: at that step it says nothing
    variance    of an ancestral step: "fixed_small" the posterior's, "fixed_large" beta (Ho et al., section
                3.2), or "learned_range": the network has 2 C channels out, and v, the second C of them,
                sets log variance = f log beta + (1 - f) log posterior, f = (v + 1) / 2 (Nichol and
                Dhariwal, equation 15)

    beta, alpha_bar   float64 (T,), read-only; alpha_bar falls strictly, and to 0 only with zero_snr
    """

    def __init__(
        self, timesteps=1000, schedule="cosine", prediction="eps", betas=None, zero_snr=False,
        variance="fixed_small",
    ):  # fmt: skip
        for name, value, known in (
            ("schedule", schedule, SCHEDULES),
            ("prediction", prediction, PREDICTIONS),
            ("variance", variance, VARIANCES),
        ):
            if not isinstance(value, str) or value not in known:
                raise NanodiffError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
        least = 21 if schedule in ENDS and betas is None else 2 if zero_snr else 1
        whole = isinstance(timesteps, (int, np.integer)) and not isinstance(timesteps, bool)
        if not whole or not least <= timesteps <= 10**6:
            raise NanodiffError(
                f"timesteps = {timesteps!r}: the {schedule} schedule needs an integer of at least {least}, "
                "and at most 1000000"
            )
        if betas is not None:
            if schedule not in ENDS:
                raise NanodiffError(f"betas = {betas!r}: must be None, as the {schedule} schedule has none")
            ok = isinstance(betas, (tuple, list)) and len(betas) == 2
            ok = ok and all(isinstance(b, (int, float)) for b in betas) and 0 < betas[0] <= betas[1] < 1
            if not ok:
                raise NanodiffError(f"betas = {betas!r}: must be two numbers, 0 < first <= last < 1, or None")
            betas = tuple(map(float, betas))
        if zero_snr and prediction == "eps":
            raise NanodiffError(
                "prediction 'eps' with zero_snr: the last step is pure noise, of which eps says nothing; "
                "use 'v' or 'x0'"
            )
        T = self.timesteps = int(timesteps)
        self.schedule, self.prediction, self.betas = schedule, prediction, betas
        self.zero_snr, self.variance = bool(zero_snr), variance
        ends = (betas or (1e-4 * (1000 / T), 0.02 * (1000 / T))) if schedule in ENDS else ()
        self.beta = SCHEDULES[schedule](T, *ends)
        self.alpha_bar = np.cumprod(1 - self.beta)
        if zero_snr:
            root = np.sqrt(self.alpha_bar)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            self.alpha_bar = root**2
            self.beta = 1 - self.alpha_bar / np.append(1.0, self.alpha_bar[:-1])
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
        if self.prediction == "eps":
            return 1 / a, -s / a
        return (0 * a, 1 + 0 * a) if self.prediction == "x0" else (a, -s)

    def eps_weights(self, a, s):
        """(wx, wp) with eps = wx xt + wp prediction."""
        if self.prediction == "x0":
            return 1 / s, -a / s
        return (0 * a, 1 + 0 * a) if self.prediction == "eps" else (s, a)

    def to_x0_eps(self, xt, pred, a, s):  # (B,...), (B,...), (B,), (B,) -> (B,...), (B,...)
        """The image and the noise that a prediction stands for. a, s as from `scales`, or two numbers.

        All arrays of one device. At the noisy end of the cosine schedule a is 5e-5: there an error in a
        predicted eps is 20,000 times as large in x0, which is why samplers clip x0.
        """
        if getattr(a, "ndim", 0):
            a, s = (w.reshape(-1, *[1] * (xt.ndim - 1)) for w in (a, s))
        (xx, xp), (ex, ep) = self.x0_weights(a, s), self.eps_weights(a, s)
        return xx * xt + xp * pred, ex * xt + ep * pred

    def loss_weight(self, t, gamma):  # (B,) ints -> (B,) float32
        """Min-SNR weights of the loss (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) in units of x0.

        The squared error of x0 is that of eps over SNR, SNR = alpha_bar / (1 - alpha_bar), and that of v over
        SNR + 1: so min(SNR, gamma) / SNR for eps, and over SNR + 1 for v. With gamma = 5 the many easy,
        hardly noised images no longer outweigh the rest.
        """
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        per = {"eps": snr, "x0": 1.0, "v": snr + 1}[self.prediction]
        return (np.minimum(snr, gamma) / per).astype(np.float32)

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

    def ancestral_sigma(self, t, p, v=None):
        """Deviation of DDPM's step from t to p by `variance`; v: the network's second half, learned_range.

        With steps left out beta is that of the whole stride, 1 - alpha_bar_t / alpha_bar_p. The last step,
        p = -1, adds no noise.
        """
        if p < 0:
            return 0.0
        small, large = self.step_back(t, p, 1.0)[2], math.sqrt(1 - self.alpha_bar[t] / self.alpha_bar[p])
        if v is None:
            return large if self.variance == "fixed_large" else small
        f = (v + 1) / 2
        return large**f * small ** (1 - f)

    # ---- the variational bound: Ho et al. 2020, equation 5; Nichol and Dhariwal 2021, section 3.1 ----
    def _log_variances(self, t):  # (B,) -> log posterior variance, log beta: (B,1,1,1)
        """At t = 0 the posterior's variance is 0: there it is taken as at t = 1, and so is fixed_large's beta
        (Ho et al.'s code)."""
        later = np.maximum(t, min(1, self.timesteps - 1))
        small = self.beta[later] * (1 - self._before()[later]) / (1 - self.alpha_bar[later])
        small, large = np.log(np.maximum(small, 1e-20)), np.log(self.beta[t])
        if self.variance == "fixed_large":
            large = np.where(t > 0, large, small)
        return (w.reshape(-1, 1, 1, 1) for w in (small, large))

    def bound(self, x0, xt, pred, t, clip=False):  # (B,H,W,C) x 2, (B,H,W,C or 2C), (B,) -> (B,), like pred
        """The bound's term of each sample at its own t, in bits per dimension, and its gradient.

        t > 0: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), both normal. Their means are w0 x0 and w0 x0hat
        apart from a part they share; with l the log variance of p and l' that of q
            KL = (l - l' - 1 + exp(l' - l) + w0^2 (x0 - x0hat)^2 exp(-l)) / 2
        t = 0: -log p(x0 | x_0), the normal's mass within 1/255 of x0, the outermost bins open to infinity.
        The gradient is that of the sum over the batch, by l alone: the mean learns from the squared error
        (Nichol and Dhariwal, section 3.1 stop it here too). dl/dv = (log beta - log posterior) / 2 and
            dKL/dl = (1 - exp(l' - l) - w0^2 (x0 - x0hat)^2 exp(-l)) / 2
            d(-log mass)/dl = (z+ cdf'(z+) - z- cdf'(z-)) / (2 mass), as z = (x0 +- 1/255 - x0hat) exp(-l / 2)
        clip: hold x0hat in [-1, 1], as samplers do. float64 inside.
        """
        C, t = x0.shape[-1], np.asarray(t)
        x0, xt, pred = (np.asarray(a, np.float64) for a in (x0, xt, pred))
        now, before = (table[t].reshape(-1, 1, 1, 1) for table in (self.alpha_bar, self._before()))
        wx, wp = self.x0_weights(np.sqrt(now), np.sqrt(1 - now))
        guess = wx * xt + wp * pred[..., :C]
        guess = guess.clip(-1, 1) if clip else guess
        w0 = np.sqrt(before) * (1 - now / before) / (1 - now)
        small, large = self._log_variances(t)
        f = (pred[..., C:] + 1) / 2 if pred.shape[-1] > C else float(self.variance == "fixed_large")
        log = np.broadcast_to(f * large + (1 - f) * small, x0.shape)

        gap, ratio = (w0 * (x0 - guess)) ** 2 * np.exp(-log), np.exp(small - log)
        terms, slope = (log - small - 1 + ratio + gap) / 2, (1 - ratio - gap) / 2
        at0 = np.broadcast_to(t.reshape(-1, 1, 1, 1) == 0, x0.shape)
        if at0.any():
            x, scale = x0[at0], np.exp(-log[at0] / 2)
            high, low = (scale * (x - guess[at0] + side) for side in (1 / 255, -1 / 255))
            (above, dabove), (below, dbelow) = map(_normal_cdf, (high, low))
            above, dabove = np.where(x > 0.999, 1, above), np.where(x > 0.999, 0, dabove)
            below, dbelow = np.where(x < -0.999, 0, below), np.where(x < -0.999, 0, dbelow)
            mass = np.maximum(above - below, 1e-12)
            terms[at0] = -np.log(mass)
            slope[at0] = np.where(above - below > 1e-12, (high * dabove - low * dbelow) / (2 * mass), 0)
        grad = np.zeros_like(pred)
        per = x0[0].size * math.log(2)
        if pred.shape[-1] > C:
            grad[..., C:] = slope * (large - small) / 2 / per
        return terms.sum((1, 2, 3)) / per, grad

    def prior_bits(self, x0):  # (B,H,W,C) -> (B,)
        """The bound's first term: KL(q(x_{T-1} | x0) || N(0, 1)) in bits per dimension."""
        last = self.alpha_bar[-1]
        kl = (last * np.square(x0, dtype=np.float64) - last - math.log1p(-last)) / 2
        return kl.mean((1, 2, 3)) / math.log(2)

    def hybrid_loss(self, pred, target, x0, xt, t):  # -> loss float64 (1,), dpred like pred
        """Squared error of the first half of `pred` plus T / 1000 of the bound at t (Nichol and Dhariwal,
        equation 16: lambda = 0.001 times the T terms that a random t stands for), averaged over the batch."""
        C, B = x0.shape[-1], len(x0)
        bits, dpred = self.bound(x0, xt, pred, t)
        off = pred[..., :C].astype(np.float64) - target
        scale = self.timesteps / 1000 / B
        dpred *= scale
        dpred[..., :C] = 2 * off / off.size
        return np.array([np.square(off).mean() + scale * bits.sum()]), dpred.astype(pred.dtype)

    def _before(self):  # alpha_bar of t - 1, for t = 0 .. T-1
        return np.append(1.0, self.alpha_bar[:-1])

    def to_dict(self):
        """What makes this object, as JSON knows it."""
        return {
            "timesteps": self.timesteps, "schedule": self.schedule, "prediction": self.prediction,
            "betas": self.betas and list(self.betas), "zero_snr": self.zero_snr, "variance": self.variance,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, d):
        """The inverse of `to_dict`; what is missing takes its default."""
        known = ("timesteps", "schedule", "prediction", "betas", "zero_snr", "variance")
        unknown = set(d) - set(known)
        if unknown:
            raise NanodiffError(
                f"diffusion setting {sorted(unknown)[0]!r} is not known; use {', '.join(known)}"
            )
        return cls(**d)


def _normal_cdf(z):
    """The normal distribution's and its derivative, by Page's formula (1977), 2e-4 at worst: what published
    bits per dimension are made with."""
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    tanh = np.tanh(u)
    return (1 + tanh) / 2, (1 - tanh**2) / 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
