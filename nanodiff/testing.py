"""CASES, the one table of ops that tests and benchmarks read; run, assert_close and check_gradient."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from nanodiff import kernels

# arguments that an op may write into: gradients of parameters are added into, update ops work in place
WRITTEN = {"dweight", "dbias", "dtable", "weights", "m", "v", "ema", "state", "buffer"}
EPS = 1e-5  # of every group norm here


def rounding(n=1):
    """Relative error to allow a float32 sum of n products: 4 sqrt(n) 2^-23.

    With terms of random signs and every partial sum rounded by up to half of 2^-23, the error is about
    sqrt(n) / 5 such units; 4 leaves room for another order of summation and for a polynomial exp.
    """
    return 4 * math.sqrt(n) * 2.0**-23


@dataclass(frozen=True)
class Case:
    """One op. Dimensions are a dict such as dict(B=2, H=5, ...); the functions get them as a namespace d.

    make    (rng, d) -> positional arguments: plain values, integer arrays, float32 arrays of size about 1
    shapes  the dimensions to test: odd and tiny images, channels around multiples of 16, all kinds of border
    bench   realistic ones, to time
    flops   d -> multiplications and additions (an exp or a sine counts as ten); for bytes see `traffic`
    torch   (torch, *arguments) -> a tensor or a tuple of them, like what the op returns; see `pytorch`
    error   d -> relative RMS error to allow;  floor: results that cancel to nothing are taken for this large
    equal   whether PyTorch makes the same numbers (not those of Philox)
    names   of the arguments of a backward's forward;  leaves: of what it makes gradients of, in their order
    """

    make: Callable
    shapes: tuple
    bench: dict
    flops: Callable
    torch: Callable
    error: Callable = lambda d: rounding()
    floor: float | Callable = 0
    equal: bool = True
    names: tuple = ()
    leaves: tuple = ()

    def arguments(self, dims, seed=0):
        return self.make(np.random.default_rng(seed), SimpleNamespace(**dims))

    def limits(self, dims):
        """Keywords for assert_close."""
        floor = self.floor() if callable(self.floor) else self.floor
        return dict(error=self.error(SimpleNamespace(**dims)), floor=floor)

    def cost(self, dims):
        return self.flops(SimpleNamespace(**dims))

    def pytorch(self, op, *arguments):
        """A function that does the same in PyTorch, to be timed; arguments: the op's, tensors for arrays.

        For a backward it makes the gradients alone, by autograd; their forward is done here.
        """
        import torch

        if not self.leaves:
            return lambda: self.torch(torch, *arguments)
        have = dict(zip(_names(op), arguments))
        dout, residual = have["dout"], have.get("residual")
        # what the forward needs and the backward is not handed: only the shapes matter
        have |= {n[1:]: have[n] for n in ("dbias", "dtable") if n in have and n[1:] not in have}
        if dout.ndim == 4:
            have = {"x": dout[:, ::2, ::2], "emb": dout.sum((1, 2))} | have
        have = dict(eps=EPS, emb=None) | have
        have |= {n: have[n].detach().requires_grad_() for n in self.leaves} | {"residual": None}
        out, wanted = self.torch(torch, *map(have.get, self.names)), [have[n] for n in self.leaves]

        def gradients():
            first, *rest = torch.autograd.grad(out, wanted, dout, retain_graph=True)
            return [first if residual is None else first + residual, *rest]

        return gradients


def prepare(k, op, args):
    """Put into a list of arguments of k's conv_forward or upconv_forward, in place, prepared weights."""
    if op in ("conv_forward", "upconv_forward"):
        args[1] = getattr(k, op.replace("forward", "prepare"))(args[1], *args[0].shape[1:3], *args[3:5])


def run(rendition, op, arguments, dtype=np.float32):
    """All that an op makes: a list of what it returns, then of the arguments that it adds into or updates.

    Works on copies, of float32 ones as `dtype`, and prepares weights. Asserts that the op wrote into no other
    argument.
    """
    k, names, array = kernels.load(rendition), _names(op), np.ndarray
    args = [a.astype(dtype if a.dtype == "f4" else a.dtype) if isinstance(a, array) else a for a in arguments]
    prepare(k, op, args)
    before = [a.copy() if isinstance(a, array) else a for a in args]
    out = getattr(k, op)(*args)
    for n, a, b in zip(names, args, before):
        assert n in WRITTEN or not isinstance(a, array) or a.tobytes() == b.tobytes(), f"{op} wrote into {n}"
    return returned(op, out) + [a for n, a in zip(names, args) if n in WRITTEN]


def returned(op, out):
    """The list of what an op returned; dq, dk and dv are one array."""
    return [] if out is None else list(out) if isinstance(out, tuple) or op == "attention_backward" else [out]


def product_error(n, winograd=False):
    """Relative RMS error to allow a sum of n products of weights and activations: `rounding`, or 1e-5 where
    they are made of bfloat16 on a matrix unit (4e-6, tiles_cpu.py) or by Winograd (3e-6: its constants
    scale by up to 8), or both (9.9e-6, amx_winograd_cpu.py)."""
    from nanodiff.kernels.parallel_cpu import AMX

    return max(rounding(n), 1e-5 * bool(winograd or AMX))


def unit_floor():
    """On a matrix unit errors follow the terms, of size about 1, even where a few of them cancel; else no
    floor."""
    from nanodiff.kernels.parallel_cpu import AMX

    return float(AMX > 0)


def traffic(arguments, results):
    """Bytes that must move at the least: every argument is read and every result written, once."""
    return sum(a.nbytes for a in [*arguments, *results] if isinstance(a, np.ndarray))


def assert_close(actual, expected, error=None, floor=0, what=""):
    """RMS of the difference at most `error` (default: rounding()) times that of `expected`, or `floor`.

    The RMS over an array still sees one wrong element: that alone is an error of 1 / sqrt(size).
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if expected.dtype.kind != "f":
        assert np.array_equal(actual, expected), f"{what}: integers differ"
    elif expected.size:
        off, size = (math.sqrt(np.square(a, dtype=np.float64).mean()) for a in (actual - expected, expected))
        limit = (rounding() if error is None else error) * max(size, floor)
        assert off <= limit, f"{what}: RMS error {off:.3g}, limit {limit:.3g}, RMS expected {size:.3g}"


STEP = 3e-6  # of central differences in float64: truncation and rounding both stay near 1e-10


def check_gradient(forward, gradients, inputs, full=200, seed=0):
    """A backward against central differences of its forward: 1e-6 absolute or 1e-5 relative.

    forward    () -> float64 output, from the arrays in `inputs`, which are changed in place to probe it
    gradients  dout -> {name: gradient} for every name in `inputs`, {name: float64 array}
    full       up to this size, each element of an input is moved alone, and each element of dout set alone:
               the whole Jacobian. Above it: along two random directions, and for one random dout.
    """
    rng, shape = np.random.default_rng(seed), forward().shape
    n = math.prod(shape)
    douts = np.eye(n) if n <= full else rng.standard_normal((1, n))
    analytic = [gradients(d.reshape(shape)) for d in douts]
    for name, x in inputs.items():
        start, numeric = x.copy(), []
        moves = np.eye(x.size) if x.size <= full else rng.choice([-1.0, 1.0], (2, x.size))
        for move in moves.reshape(-1, *x.shape):
            x[...] = start + STEP * move
            above = forward().copy()
            x[...] = start - STEP * move
            numeric.append((above - forward()).ravel() / (2 * STEP))
        x[...] = start
        got = np.array([g[name].ravel() for g in analytic]) @ moves.T
        np.testing.assert_allclose(got, douts @ np.array(numeric).T, rtol=1e-5, atol=1e-6, err_msg=name)


# ---- arguments ----
def _names(op):
    return list(inspect.signature(getattr(kernels.load("ref"), op)).parameters)


def _normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _normals(n, *options):  # n arrays of d.shape, then the dimensions named in `options`
    return lambda rng, d: [*(_normal(rng, *d.shape) for _ in range(n)), *(getattr(d, o) for o in options)]


def _linear(rng, d):
    stack = [d.stack] if getattr(d, "stack", 0) else []
    weight = _normal(rng, *stack, d.C, d.O) / np.float32(d.C**0.5)
    residual = _normal(rng, *d.shape, d.O) if d.residual else None
    return [_normal(rng, *d.shape, d.C), weight, _normal(rng, *stack, d.O), residual]


def _conv(rng, d):  # plus: "e" an embedding, "r" a residual
    weight = _normal(rng, d.K, d.K, d.C, d.O) / np.float32(d.K * d.C**0.5)
    emb = _normal(rng, d.B, d.O) if "e" in d.plus else None
    residual = _normal(rng, d.B, *_conv_size(d), d.O) if "r" in d.plus else None
    return [_normal(rng, d.B, d.H, d.W, d.C), weight, _normal(rng, d.O), d.stride, d.pad, emb, residual]


def _upconv(rng, d):
    weight = _normal(rng, 3, 3, d.C, d.O) / np.float32(3 * d.C**0.5)
    return [_normal(rng, d.B, d.H, d.W, d.C), weight, _normal(rng, d.O)]


def _conv_size(d):
    return [(n + sum(d.pad) - d.K) // d.stride + 1 for n in (d.H, d.W)]


def _conv_error(length):
    return lambda d: product_error(length(d), (d.K, d.stride, d.C % 16, d.O % 16) == (3, 1, 0, 0))


def _groupnorm(rng, d):
    x = _normal(rng, d.B, d.H, d.W, d.C) + np.float32(d.offset)
    return [x, _normal(rng, d.C), _normal(rng, d.C), d.G, EPS, d.silu]


def _groupnorm_again(rng, d):
    x, weight, bias, groups, eps, silu = _groupnorm(rng, d)
    _, mean, rstd = run("ref", "groupnorm_forward", [x, weight, bias, groups, eps, silu], np.float64)
    return [x, mean.astype(np.float32), rstd.astype(np.float32), weight, bias, groups, silu]


def _groupnorm_error(
    d,
):  # x is noise of size 1 + offset: rounding x itself changes the noise by offset roundings
    return rounding(d.B * d.H * d.W * d.C / d.G) * (1 + abs(d.offset))


def _attention(rng, d):
    q, k, v = (_normal(rng, d.B, d.N, d.C) for _ in range(3))
    return [q * np.float32(d.scale), k, v, d.heads]


def _attention_error(d):  # an error of a score of size s changes its exponential by s such errors
    return product_error(max(d.N, d.C / d.heads)) * (1 + d.scale)


def _join(rng, d):
    return [_normal(rng, d.B, d.H, d.W, d.C), _normal(rng, d.B, d.H, d.W, d.D)]


def _q_sample(rng, d):
    return [*_normals(2)(rng, d), _normal(rng, d.shape[0]), _normal(rng, d.shape[0]), d.prediction]


def _mse_loss(rng, d):
    weight = np.abs(_normal(rng, d.shape[0])) if getattr(d, "weighted", 0) else None
    return [*_normals(2)(rng, d), weight]


def _gather(rng, d):
    images = rng.integers(0, 256, (d.N, d.H, d.W, d.C), np.uint8)
    return [images, rng.integers(0, d.N, d.B), rng.integers(0, 2, d.B, np.uint8)]


def _adam(rng, d):
    weights, grad, m, v = (_normal(rng, d.n) for _ in range(4))
    state = np.array([0.5, np.square(grad, dtype=np.float64).sum(), d.taken, 0])
    ema = _normal(rng, d.n if d.ema else 0)
    return [weights, grad, m, v**2, ema, state, 1e-3, 0.9, 0.999, 1e-8, d.clip, d.ema]


def _backward(op, leaves, results="out", flops=2, **changes):
    """Enter <op>_backward, after <op>_forward, of which it has `flops` times the flops.

    Its arguments by name: the forward's, the forward's `results`, and for `dabc` normals of the shape of abc.
    """
    case, names = CASES[f"{op}_forward"], _names(f"{op}_forward")
    wanted = [name for name in _names(f"{op}_backward") if name != "wants_dx"]

    def make(rng, d):
        have = dict(zip(names, case.make(rng, d)))
        made = run("ref", f"{op}_forward", list(have.values()), np.float64)
        have |= zip(results.split(), (a.astype(np.float32) for a in made))
        if "residual" in wanted:
            have["residual"] = _normal(rng, *have["x"].shape) if d.residual else None
        return [have[n] if n in have else _normal(rng, *have[n[1:]].shape) for n in wanted]

    changes |= dict(make=make, names=tuple(names), leaves=tuple(leaves.split()))
    CASES[f"{op}_backward"] = replace(case, flops=lambda d: flops * case.flops(d), **changes)


# ---- PyTorch: images in its order of dimensions are views of the same memory, "channels last" ----
def _torch_linear(torch, x, weight, bias, residual):
    if weight.ndim == 3:
        return torch.stack([torch.nn.functional.linear(x, w.T, b) for w, b in zip(weight, bias)])
    out = torch.nn.functional.linear(x, weight.T, bias)
    return out if residual is None else out.add_(residual)


def _torch_conv(torch, x, weight, bias, stride, pad, emb, residual):
    x, weight, p = x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), pad[0]
    if pad[0] != pad[1]:
        x, p = torch.nn.functional.pad(x, (*pad, *pad)), 0
    out = torch.conv2d(x, weight, bias, stride, p).permute(0, 2, 3, 1)
    out = out if emb is None else out.add_(emb[:, None, None])
    return out if residual is None else out.add_(residual)


def _torch_upconv(torch, x, weight, bias):
    x = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2)
    return torch.conv2d(x, weight.permute(3, 2, 0, 1), bias, 1, 1).permute(0, 2, 3, 1)


def _torch_groupnorm(torch, x, weight, bias, groups, eps, silu):
    y = torch.group_norm(x.permute(0, 3, 1, 2), groups, weight, bias, eps)
    return (torch.nn.functional.silu(y) if silu else y).permute(0, 2, 3, 1)


def _torch_modulate(torch, x, emb, kind):
    scale, shift = emb[:, None, None].chunk(2, -1)
    return getattr(torch.nn.functional, kind)(x * (1 + scale) + shift)


def _torch_attention(torch, q, k, v, heads):
    split = (a.view(*a.shape[:2], heads, -1).transpose(1, 2) for a in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(q.shape)


def _torch_time(torch, t, dim, flip, shift):
    angle = t[:, None] * torch.exp(torch.arange(dim // 2) * (-math.log(1e4) / (dim // 2 - shift)))
    waves = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    return torch.nn.functional.pad(torch.cat(waves, 1), (0, dim % 2))


def _torch_q_sample(torch, x0, eps, a, s, prediction):
    a, s = (c.view(-1, *[1] * (x0.ndim - 1)) for c in (a, s))
    return a * x0 + s * eps, {"eps": eps, "x0": x0}[prediction] if prediction != "v" else a * eps - s * x0


def _torch_mse(torch, pred, target, weight):
    w = 1 if weight is None else weight.view(-1, *[1] * (pred.ndim - 1))
    diff = pred - target
    loss = torch.nn.functional.mse_loss(pred, target) if weight is None else (w * diff * diff).mean()
    return loss[None], w * diff * (2 / diff.numel())


def _torch_sample_step(torch, x, pred, z, c, limit):
    x0 = c[0] * x + c[1] * pred
    x0 = x0.clip(-limit, limit) if limit else x0
    return c[2] * x0 + c[3] * x + c[4] * z, x0


def _torch_adam(torch, weights, grad, m, v, ema, state, lr, beta1, beta2, eps, clip, ema_decay):
    adam = torch.optim.Adam([weights], lr, (beta1, beta2), eps, fused=True)  # without clipping and average
    adam.state[weights] = {"step": state[2].float(), "exp_avg": m, "exp_avg_sq": v}
    weights.grad = grad
    adam.step()


# ---- the table ----
def _dims(names, rows):
    """Dimensions from rows of text: numbers; 2x5x7 is a shape, 01 the pad (0, 1), - an empty `plus`."""

    def value(name, word):
        if name in ("shape", "pad"):
            return tuple(map(int, word.split("x") if name == "shape" else word))
        if name in ("plus", "kind"):
            return word.strip("-")
        return float(word) if "." in word else int(word)

    rows = (zip(names.split(), row.split(), strict=True) for row in rows.split(","))
    return tuple({name: value(name, word) for name, word in row} for row in rows)


def _each(flops):  # operations for each element of d.shape
    return lambda d: flops * math.prod(d.shape)


_LINEARS = _dims(
    "shape C O residual",
    "1 1 1 0, 3 5 16 1, 2x7 24 3 0, 13 48 32 1, 2x33 16 48 0, 200 3 5 1, 3x40 33 17 0, 1x600 16 16 1",
) + _dims(
    "shape C O residual stack", "1 1 1 0 1, 2x3 5 3 0 3, 3x40 33 17 0 2, 2x64 64 32 0 3, 1x257 16 48 0 3"
)
_CONVS = _dims(
    "B H W C O K stride pad plus",  # plus: e(mbedding), r(esidual)
    """1 1 1 1 1 1 1 00 -, 1 1 1 3 5 3 1 11 er, 2 5 7 3 16 3 1 11 -, 2 6 9 16 1 3 1 11 e, 1 8 8 5 24 3 1 11 r,
    2 9 6 24 16 3 1 11 e, 1 6 6 16 16 3 1 11 -, 2 7 9 16 32 3 1 11 er, 1 13 6 48 16 3 1 11 r,
    3 8 16 32 48 3 1 11 e, 16 8 8 16 16 3 1 11 -, 1 10 31 80 96 3 1 11 r, 2 4 4 16 32 3 1 11 r,
    1 5 12 32 16 3 1 11 -, 1 2 3 48 48 3 1 11 e, 2 8 6 16 16 3 2 11 -, 1 7 5 3 5 3 2 11 r, 1 1 1 1 3 3 2 11 -,
    5 4 6 48 32 3 2 11 e, 2 8 6 16 24 3 2 01 er, 1 7 5 5 3 3 2 01 -, 2 2 2 32 16 3 2 01 e,
    2 9 6 1 48 3 2 01 -, 3 5 7 24 48 1 1 00 er, 1 8 8 48 16 1 1 00 -, 2 3 1 5 3 1 2 00 -,
    1 4 5 16 16 1 1 01 -, 2 6 7 3 5 5 1 22 e, 1 6 9 3 16 2 2 00 -, 1 9 10 3 5 4 3 22 r,
    2 9 16 64 32 3 1 11 er, 1 9 20 32 96 3 1 11 r, 3 16 16 160 64 3 1 11 e, 10 32 32 32 32 3 1 11 er""",
)
_UPCONVS = _dims(
    "B H W C O", "1 1 1 1 1, 2 3 5 3 16, 1 4 4 16 16, 2 5 7 24 40, 3 8 8 32 32, 2 2 9 48 16, 1 16 16 32 64"
)
_CONV = dict(B=8, H=32, W=32, C=128, O=128, K=3, stride=1, pad=(1, 1), plus="e")
_NORMS = _dims(
    "B H W C G offset silu residual",
    """1 1 1 16 2 0 1 0, 2 5 7 24 3 0 1 1, 3 4 4 5 5 0 0 0, 1 8 8 32 8 0 1 1, 4 3 3 48 1 1 0 1,
    2 8 8 16 4 100 1 0, 1 9 7 48 8 100 0 0, 1 6 6 96 8 1 1 0, 1 20 20 384 4 0 1 1""",
)
_ATTENTIONS = _dims(
    "B N C heads scale",
    """1 1 5 1 1, 1 1 8 2 1, 2 7 16 2 1, 1 16 16 1 1, 3 17 32 2 1, 1 30 40 1 3, 2 20 15 3 1, 1 100 32 1 1,
    2 50 48 3 1, 2 64 8 1 20, 1 49 16 2 1, 1 150 40 2 1, 2 70 36 3 1, 1 33 72 9 1, 1 300 36 2 1""",
)
_UPSAMPLES = _dims("shape", "1x1x1x1, 2x3x5x3, 1x7x2x24, 3x4x4x16")
_JOINS, _WIDE = _dims("B H W C D", "1 1 1 1 1, 2 5 3 16 3, 1 4 6 5 48"), _CONV | dict(D=128)
_KINDS = "1 gelu, 2x5x7x3 mish, 3x100x111 relu, 1x16384 gelu, 2x5x7x3 silu, 3x100x111 mish"
_MODULATIONS = """1 1 1 1 mish, 2 5 7 3 gelu, 3 4 4 16 silu, 1 9 7 40 relu, 2 3 30 72 silu, 1 6 6 17 mish,
    2 4 20 96 gelu"""
_SHAPES, _BIG = _dims("shape", "1, 2x5x7x3, 1x16384, 3x100x111"), dict(shape=(8, 32, 32, 128))
_TIMES = _dims("B dim flip shift", "1 2 0 0, 3 7 1 0, 2 32 0 1, 5 16 1 1")
_DROPOUTS = _dims(
    "shape rate seed step site", "1 .25 1 2 0, 2x5x7x3 .3 1099511627776 0 7, 3x100x111 .5 0 9 30"
)
_ADAMS = _dims("n taken clip ema", "1 0 0 0, 1000 0 1. .999, 70001 5 .5 0, 501 3 0 .9")
_DRAWS = _dims(
    "shape seed step purpose first",
    "1 1 2 3 0, 5 0 0 0 7, 2x5x3x3 9 1 2 0, 3x7 9223372036854775813 4294967295 6 2147483648, 2x9001 4 3 2 1",
)
_DRAW = dict(shape=(8, 32, 32, 3), seed=1, step=2, purpose=0, first=0)
_draw = _normals(0, "shape", "seed", "step", "purpose", "first")
CASES = {
    "linear_forward": Case(
        _linear, _LINEARS, dict(shape=(8, 256), C=256, O=256, residual=0),
        lambda d: 2 * math.prod(d.shape) * d.C * d.O * (getattr(d, "stack", 0) or 1), _torch_linear,
        lambda d: product_error(d.C),
        floor=unit_floor),
    "conv_prepare": Case(
        lambda rng, d: [_conv(rng, d)[1], d.H, d.W, d.stride, d.pad], _CONVS, _CONV, lambda d: 0,
        lambda t, weight, *_: weight, equal=False),
    "conv_forward": Case(
        _conv, _CONVS, _CONV, lambda d: 2 * d.B * math.prod(_conv_size(d)) * d.K**2 * d.C * d.O, _torch_conv,
        _conv_error(lambda d: d.K**2 * d.C), floor=unit_floor),
    "upconv_prepare": Case(
        lambda rng, d: [_upconv(rng, d)[1], d.H, d.W], _UPCONVS, dict(B=8, H=16, W=16, C=256, O=256),
        lambda d: 0, lambda t, weight, *_: weight, equal=False),
    "upconv_forward": Case(
        _upconv, _UPCONVS, dict(B=8, H=16, W=16, C=256, O=256), lambda d: 72 * d.B * d.H * d.W * d.C * d.O,
        _torch_upconv, lambda d: product_error(9 * d.C, d.C % 16 == d.O % 16 == 0), floor=unit_floor),
    "groupnorm_forward": Case(
        _groupnorm, _NORMS, dict(B=8, H=32, W=32, C=128, G=32, offset=0, silu=1, residual=0),
        lambda d: 19 * d.B * d.H * d.W * d.C, _torch_groupnorm, _groupnorm_error),
    "groupnorm_again": Case(
        _groupnorm_again, _NORMS, dict(B=8, H=32, W=32, C=128, G=32, offset=0, silu=1, residual=0),
        lambda d: 16 * d.B * d.H * d.W * d.C,
        lambda t, x, mean, rstd, weight, bias, G, silu: _torch_groupnorm(t, x, weight, bias, G, EPS, silu),
        _groupnorm_error),
    "attention_forward": Case(
        _attention, _ATTENTIONS, dict(B=8, N=256, C=256, heads=1, scale=1), lambda d: 4 * d.B * d.N**2 * d.C,
        _torch_attention, _attention_error),
    "upsample_forward": Case(
        _normals(1), _UPSAMPLES, dict(shape=(8, 16, 16, 256)), _each(2),  # half the additions of its backward
        lambda t, x: t.nn.functional.interpolate(x.permute(0, 3, 1, 2), scale_factor=2).permute(0, 2, 3, 1)),
    "concat": Case(_join, _JOINS, _WIDE, lambda d: 0, lambda t, a, b: t.cat([a, b], -1)),
    "split": Case(
        lambda rng, d: [np.concatenate(_join(rng, d), -1), d.C], _JOINS, _WIDE, lambda d: 0,
        lambda t, x, C: (x[..., :C].contiguous(), x[..., C:].contiguous())),
    "add": Case(_normals(2), _SHAPES, _BIG, _each(1), lambda t, a, b: a + b),
    "affine": Case(
        _normals(1, "a", "b"), _dims("shape a b", "1 2 -1, 2x5x7x3 .25 0, 3x100x111 2 -1"),
        _BIG | dict(a=2, b=-1), _each(2), lambda t, x, a, b: a * x + b),
    "activation_forward": Case(
        _normals(1, "kind"), _dims("shape kind", _KINDS), _BIG | dict(kind="silu"), _each(13),
        lambda t, x, kind: getattr(t.nn.functional, kind)(x), floor=1),
    "modulate_forward": Case(
        lambda rng, d: [_normal(rng, d.B, d.H, d.W, d.C), _normal(rng, d.B, 2 * d.C), d.kind],
        _dims("B H W C kind", _MODULATIONS), dict(B=8, H=32, W=32, C=128, kind="silu"),
        lambda d: 16 * d.B * d.H * d.W * d.C, _torch_modulate, floor=1),
    "time_embedding": Case(
        lambda rng, d: [rng.integers(0, 1000, d.B), d.dim, d.flip, d.shift],
        _TIMES, dict(B=128, dim=128, flip=0, shift=1), lambda d: 11 * d.B * d.dim, _torch_time,
        lambda d: 1000 * rounding()),  # PyTorch's angles, up to 1000, are float32
    "embedding_forward": Case(
        lambda rng, d: [rng.integers(0, d.K, d.B), _normal(rng, d.K, d.D)],
        _dims("B K D", "1 1 1, 5 3 16, 9 10 5"), dict(B=128, K=10, D=512), lambda d: 0,
        lambda t, labels, table: t.nn.functional.embedding(labels, table)),
    "dropout": Case(
        _normals(1, "rate", "seed", "step", "site"), _DROPOUTS, _BIG | dict(rate=0.1, seed=1, step=2, site=3),
        _each(4), lambda t, x, rate, *_: t.dropout(x, rate, True), equal=False),
    "q_sample": Case(
        _q_sample, tuple(dict(shape=(3, 5, 7, 3), prediction=p) for p in ("eps", "x0", "v")),
        _BIG | dict(prediction="v"), _each(6), _torch_q_sample),
    "mse_loss": Case(
        _mse_loss, _SHAPES + _dims("shape weighted", "1 1, 3x5x7x3 1"), _BIG, _each(4), _torch_mse),
    "cast": Case(
        lambda rng, d: [_normal(rng, *d.shape), "float32"], _SHAPES, _BIG, lambda d: 0,
        lambda t, x, dtype: x.clone()),
    "gather_images": Case(
        _gather, _dims("N B H W C", "1 1 1 1 1, 5 3 2 3 3, 9 12 7 6 1"), dict(N=2048, B=128, H=32, W=32, C=3),
        lambda d: 2 * d.B * d.H * d.W * d.C,
        lambda t, images, chosen, mirrored: t.where(
            mirrored.bool().view(-1, 1, 1, 1), images[chosen].flip(2), images[chosen]) / 127.5 - 1),
    "sample_step": Case(
        lambda rng, d: [*_normals(3)(rng, d), _normal(rng, 5), d.limit],
        _dims("shape limit", "1 1., 2x5x7x3 0., 3x100x111 1."), _BIG | dict(limit=1.0), _each(7),
        _torch_sample_step),
    "prepare_weights": Case(
        lambda rng, d: [_normal(rng, d.n), "float32"], _dims("n", "1, 1000"), dict(n=35_746_304), lambda d: 0,
        lambda t, flat, dtype: None, equal=False),
    "zero_grad": Case(
        _normals(1), _dims("shape", "1, 1000, 70016"), dict(shape=(35_746_304,)), lambda d: 0,
        lambda t, buffer: buffer.zero_()),
    "squared_norm": Case(
        _normals(1), _dims("shape", "1, 1000, 70001"), dict(shape=(35_746_307,)), _each(2),
        lambda t, grad: t.linalg.vector_norm(grad)[None] ** 2, lambda d: rounding(256)),
    "adam_update": Case(
        _adam, _ADAMS, dict(n=35_746_307, taken=5, clip=0, ema=0), lambda d: 14 * d.n, _torch_adam,
        equal=False),  # it lacks clipping and average
    "random_bits": Case(
        _draw, _DRAWS, _DRAW, _each(25), lambda t, shape, *_: t.randint(2**32, shape), equal=False),
    "normal": Case(
        _draw, _DRAWS, _DRAW, _each(40), lambda t, shape, *_: t.randn(shape), lambda d: 0, equal=False),
}  # fmt: skip
_backward("linear", "x weight bias", error=lambda d: product_error(max(d.O, math.prod(d.shape))))
_backward("conv", "x emb weight bias",
          error=_conv_error(lambda d: max(d.K**2 * d.O, d.B * math.prod(_conv_size(d)))))  # fmt: skip
_backward("upconv", "x weight bias", floor=2,  # of dx: four gradients, which may cancel
          error=lambda d: product_error(
              max(9 * d.O, 4 * d.B * d.H * d.W), d.C % 16 == d.O % 16 == 0))  # fmt: skip
_backward("groupnorm", "x weight bias", "out mean rstd", floor=1)
_backward("attention", "q k v", "out lse", flops=2.5, floor=1)
_backward("upsample", "x")
_backward("activation", "x")
_backward("modulate", "x emb", error=lambda d: rounding(d.H * d.W))
_backward("embedding", "table")
