"""Everything that needs a GPU to be known: are the kernels right on one, and how fast are they?

    python bench/gpu.py                          # all sections; writes bench_gpu.json
    python bench/gpu.py --only correctness convs
    python bench/gpu.py --only step --network small --batch 128

correctness  every op at real shapes, in both dtypes, against the definition in float64; samples do not depend
             on the batch; recorded steps are the bits of eager ones and of a second run; a few losses against
             the CPU's
convs        TFLOP/s of each convolution of DDPM's CIFAR-10 network, forward, dx and dweight, against cuDNN as
             PyTorch calls it (bfloat16, channels_last, benchmark=True); either side from a graph
step         the whole training step (noise, forward, loss, backward, clipping, Adam, average of the weights)
             against PyTorch: eager and torch.compile, bfloat16 autocast and TF32, channels_last; peak memory
sample       a step of DDIM in the same way

It needs NumPy, Numba, CuPy and this repository, and for the comparisons PyTorch; data are random. Ours run as
recorded graphs, as in training; PyTorch as it comes, with reduce-overhead (CUDA graphs too) among its modes.
A part that fails is reported in its place and the rest goes on; what would start after --minutes (8: a
last torch.compile still ends within ten) is left out and named, and a second run with --only makes up for it.
Without a GPU: one line, and exit code 2.
The last line of stdout is the JSON object that the file holds too.
"""

import argparse
import gc
import inspect
import json
import platform
import statistics
import sys
import time
import traceback
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import nanodiff as nd  # noqa: E402
from nanodiff import data, graph, kernels  # noqa: E402
from nanodiff.kernels import device_gpu  # noqa: E402
from nanodiff.kernels.device_gpu import BF16  # noqa: E402
from nanodiff.testing import CASES, WRITTEN, returned, run  # noqa: E402

SECTIONS = ("correctness", "convs", "step", "sample")
END = [float("inf")]  # of the time in which a part may start, by time.perf_counter
# height = width, channels in and out, kernel, stride: what the network of DDPM for CIFAR-10 is made of
CONVS = (
    (32, 3, 128, 3, 1), (32, 128, 128, 3, 1), (32, 256, 128, 3, 1), (32, 384, 128, 3, 1), (32, 128, 3, 3, 1),
    (32, 256, 128, 1, 1), (32, 128, 128, 3, 2), (16, 128, 256, 3, 1), (16, 256, 256, 3, 1),
    (16, 512, 256, 3, 1), (16, 256, 256, 1, 1), (16, 256, 256, 3, 2), (8, 256, 256, 3, 1),
    (8, 512, 256, 3, 1), (4, 256, 256, 3, 1), (4, 512, 256, 3, 1),
)  # fmt: skip
# dimensions for CASES; `convs`: (height, C, O, K, stride), images of batch
REAL = dict(
    batch=16, convs=CONVS,
    linear=[dict(shape=s, C=C, O=256, residual=r) for s, C, r in (((16, 256), 256, 1), ((128,), 512, 0))]
    + [dict(shape=(16, 256), C=256, O=256, residual=0, stack=3)],
    norm=[dict(B=16, H=32, W=32, C=C, G=32, offset=0, silu=1, residual=1) for C in (128, 384)]
    + [dict(B=16, H=4, W=4, C=512, G=32, offset=1, silu=1, residual=0)],
    attention=[dict(B=16, N=256, C=256, heads=1, scale=1), dict(B=4, N=1024, C=128, heads=4, scale=1)],
    upconv=[dict(B=16, H=16, W=16, C=256, O=256)],
    many=[dict(shape=(16, 32, 32, 128))], adam=[dict(n=35_746_307, taken=5, clip=1.0, ema=0.999)],
    network="cifar10", images=32, steps=5,
)  # fmt: skip
TOY = dict(  # for a test on an emulated device
    batch=2, convs=((4, 1, 8, 3, 1), (4, 16, 8, 3, 2)),
    linear=[dict(shape=(2, 5), C=8, O=16, residual=1), dict(shape=(2, 5), C=8, O=16, residual=0, stack=3)],
    norm=[dict(B=2, H=4, W=4, C=16, G=4, offset=0, silu=1, residual=1)],
    attention=[dict(B=2, N=16, C=16, heads=1, scale=1)], upconv=[dict(B=2, H=2, W=2, C=8, O=8)],
    many=[dict(shape=(2, 4, 4, 8))],
    adam=[dict(n=1000, taken=5, clip=1.0, ema=0.999)], network="toy", images=2, steps=2,
)  # fmt: skip
TOY_NETWORK = dict(
    sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4, attention_head_dim=8,
)  # fmt: skip
FLOAT32 = set(  # what stays float32 beside bfloat16 activations
    "weight bias emb dweight dbias mean rstd lse demb table dtable c a s weights grad m v ema buffer".split()
)
MIXED = {
    "linear",
    "conv",
    "upconv",
    "groupnorm",
    "attention",
    "upsample",
    "concat",
    "split",
    "add",
}  # ops with a bfloat16 mode
# One rounding of a result to bfloat16 is 1.7e-3 relative RMS at the most; products of a backward are rounded
# twice, and attention's softmax between its products too.
BFLOAT16_LIMIT, SECONDS = 6e-3, 1.0


def network(name):
    """Configuration of a network, as a dictionary."""
    from train_step import NETWORKS

    return TOY_NETWORK if name == "toy" else NETWORKS[name]


# ---- correctness ----
def to_bfloat16(a):
    """float32 -> its bfloat16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(BF16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def on_gpu(op, arguments, narrow):
    """All that an op makes, as testing.run has it; narrow: with bfloat16 activations."""
    k, signature = kernels.load("gpu"), list(inspect.signature(getattr(kernels.load("ref"), op)).parameters)
    args = []
    for name, a in zip(signature, arguments):
        if isinstance(a, np.ndarray):
            half = narrow and a.dtype == np.float32 and name not in FLOAT32
            a = device_gpu.upload(to_bfloat16(a) if half else a)
        args.append(a)
    out = getattr(k, op)(*args)
    out = returned(op, out) + [a for name, a in zip(signature, args) if name in WRITTEN]
    return [from_bfloat16(h) if h.dtype == BF16 else h for h in map(device_gpu.download, out)]


def check_op(op, dims, narrow):
    """A row: the largest relative RMS error of the op's results, and what is allowed."""
    arguments = CASES[op].arguments(dims)
    if narrow:  # the definition gets what the kernel gets
        names = list(inspect.signature(getattr(kernels.load("ref"), op)).parameters)
        for i, (name, a) in enumerate(zip(names, arguments)):
            matrix = name == "weight" and op.startswith(("linear", "conv", "upconv"))
            if isinstance(a, np.ndarray) and a.dtype == np.float32 and (matrix or name not in FLOAT32):
                arguments[i] = from_bfloat16(to_bfloat16(a))
    got, want = on_gpu(op, arguments, narrow), run("ref", op, arguments, np.float64)
    limits = CASES[op].limits(dims)
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if b.dtype.kind == "f" and b.size:
            size = max(np.sqrt(np.square(b, dtype=np.float64).mean()), limits["floor"], 1e-30)
            worst = max(worst, float(np.sqrt(np.square(a - b, dtype=np.float64).mean()) / size))
        elif not np.array_equal(a, b):
            worst = float("inf")
    limit = max(limits["error"], BFLOAT16_LIMIT) if narrow else max(4 * limits["error"], 2e-6)
    return dict(op=op, dims=dims, dtype="bfloat16" if narrow else "float32", error=worst, limit=limit,
                ok=bool(worst <= limit))  # fmt: skip


def op_cases(what):
    """(op, dimensions) of every op that a network at the shapes `what` calls."""
    for H, C, O, K, stride in what["convs"]:
        pad = (0, 1) if stride == 2 else (K // 2, K // 2)
        for op in ("conv_forward", "conv_backward"):
            yield op, dict(B=what["batch"], H=H, W=H, C=C, O=O, K=K, stride=stride, pad=pad, plus="er")
    families = ("linear", "linear"), ("upconv", "upconv"), ("groupnorm", "norm"), ("attention", "attention")
    for family, key in families:
        for dims in what[key]:
            yield from ((f"{family}_{way}", dims) for way in ("forward", "backward"))
    for dims in what["many"]:
        yield from ((op, dims) for op in ("add", "upsample_forward", "mse_loss"))
        yield "q_sample", dims | dict(prediction="v")
        yield "normal", dims | dict(seed=1, step=2, purpose=0, first=3)
        yield "dropout", dims | dict(rate=0.1, seed=1, step=2, site=3)
    for dims in what["adam"]:
        yield from (("adam_update", dims), ("squared_norm", dict(shape=(dims["n"],))))


def late(what):
    """Whether time is up; then it says that `what` and its like are left out."""
    if time.perf_counter() > END[0]:
        print(f"  left out, time is up: {what} and what follows", flush=True)
        return True
    return False


def correctness(what=REAL):
    """Rows of ops, then of whole steps; each has `ok`."""
    capability, rows = device_gpu.capability(), []
    for op, dims in op_cases(what):
        if late(op):
            return rows
        for narrow in (False, True) if op.rpartition("_")[0] in MIXED or op in MIXED else (False,):
            if not narrow or capability >= 80:
                dtype = "bfloat16" if narrow else "float32"
                rows.append(tried(check_op, op, dims, dtype, op, dims, narrow))
                print_row(rows[-1])
    for dtype in ("float32", "bfloat16") if capability >= 80 else ("float32",):
        for check in (whole_steps, batches):
            rows.append(tried(check, check.__name__, {}, dtype, what, dtype))
            print_row(rows[-1])
    return rows


def tried(check, op, dims, dtype, *args):
    """The row that check(*args) makes; one that says what happened where it cannot."""
    try:
        return check(*args)
    except Exception as problem:
        traceback.print_exc(limit=1)
        dims = dims | dict(problem=f"{type(problem).__name__}: {problem}"[:300])
        return dict(op=op, dims=dims, dtype=dtype, error=float("inf"), limit=0.0, ok=False)


def print_row(row):
    words = " ".join(f"{k}={v}" for k, v in row["dims"].items())
    figures = f"{row['error']:9.1e} <= {row['limit']:7.1e}"
    print(
        f"  {'ok  ' if row['ok'] else 'FAIL'} {row['op']:<20} {row['dtype']:<9} {figures}  {words}",
        flush=True,
    )


def whole_steps(what, dtype):
    """A few training steps: recorded against eager and against a second time (bits), and against the CPU."""
    config = nd.UNetConfig.from_dict(network(what["network"]))
    B, steps, size = what["images"], what["steps"], config.sample_size
    images = np.random.default_rng(0).integers(0, 256, (2 * B, size, size, config.in_channels), np.uint8)
    diff = nd.Diffusion(prediction="v")

    def make(device, **options):
        model = nd.UNet(config, device=device, **options)
        return model, nd.Adam(model.params, lr=1e-4, clip=1.0, ema=0.999)

    def eager(count, device, **options):
        model, opt = make(device, **options)
        losses = []
        for step in range(count):
            x0 = data.to_float(images[data.batch_indices(len(images), B, step, 0)])
            losses.append(nd.train_step(model, opt, diff, x0, key=(0, step), lr=1e-4))
        return losses, model.ctx.to_host(model.params.data)

    def recorded():
        model, opt = make("gpu", dtype=dtype)
        training = graph.Training(model, opt, diff, images, None, B, 0)
        done = [r for step in range(steps) for r in training.step(step, 1e-4, wait=step == steps - 1)]
        return [loss for _, loss, *_ in done], model.ctx.to_host(model.params.data)

    one, two, slow = recorded(), recorded(), eager(steps, "gpu", dtype=dtype)
    same = one[0] == two[0] == slow[0] and one[1].tobytes() == two[1].tobytes() == slow[1].tobytes()
    cpu, _ = eager(min(steps, 3), "cpu")
    error = max(abs(a - b) / b for a, b in zip(one[0], cpu))
    limit = 1e-4 if dtype == "float32" else 2e-2
    dims = dict(network=what["network"], batch=B, steps=steps, same_bits=same)
    return dict(
        op="training_step", dims=dims, dtype=dtype, error=error, limit=limit, ok=bool(same and error <= limit)
    )


def batches(what, dtype):
    """The prediction of a sample does not depend on the others in its batch, to the bit."""
    config = nd.UNetConfig.from_dict(network(what["network"]))
    model, B, size = (
        nd.UNet(config, device="gpu", dtype=dtype, init="torch"),
        what["images"],
        config.sample_size,
    )
    x = np.random.default_rng(0).standard_normal((B, size, size, config.in_channels), np.float32)
    t = np.arange(B) * 7
    whole, one = (model.ctx.to_host(model.predict(x[n:], t[n:])) for n in (0, B - 1))
    error = float(np.abs(whole[B - 1] - one[0]).max())
    dims = dict(network=what["network"], batch=B)
    return dict(op="batch_of_one", dims=dims, dtype=dtype, error=error, limit=0.0, ok=error == 0)


# ---- timing ----
def ours(call, launches=None):
    """Milliseconds of call(), recorded ten times over in one graph. launches: (source, kernel, defines) ->
    whether to keep a launch; the others are left out."""
    import cupy

    backend, full = device_gpu.backend(), type(device_gpu.backend()).launch
    if launches:

        def some(source, kernel, grid, block, args, smem=0, defines=()):
            if launches(source, kernel, dict(defines)):
                full(backend, source, kernel, grid, block, args, smem, defines)

        backend.launch = some
    try:
        recorded = backend.record(lambda: [call() for _ in range(10)])
    finally:
        vars(backend).pop("launch", None)
    return timed(recorded.launch, cupy.cuda.Event, cupy.cuda.get_elapsed_time) / 10


def timed(call, event, elapsed=None, seconds=SECONDS):
    """Median milliseconds of a call on the device, by events around it, after calls that warm it up."""

    def once():
        begin, end = event(), event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return elapsed(begin, end) if elapsed else begin.elapsed_time(end)

    once(), once()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
        times.append(once())
    return statistics.median(times)


def torch_event():
    import torch

    return torch.cuda.Event(enable_timing=True)


def convs(batch=128):
    """A row for each convolution: TFLOP/s of ours and of cuDNN, forward, dx and dweight."""
    try:
        import torch

        torch.backends.cudnn.benchmark = True
    except ImportError:
        torch = None
    k, rng, rows = kernels.load("gpu"), np.random.default_rng(0), []
    print(
        f"  {'H C O K stride':<22} {'forward':>22} {'dx':>22} {'dweight':>22}   TFLOP/s: ours, cuDNN, ratio"
    )
    for H, C, O, K, stride in CONVS:
        if late(f"{H} {C} {O} {K} {stride}"):
            break
        pad = (0, 1) if stride == 2 else (K // 2, K // 2)
        out_side = (H + sum(pad) - K) // stride + 1
        x = device_gpu.upload(to_bfloat16(rng.standard_normal((batch, H, H, C), np.float32)))
        dout = device_gpu.upload(to_bfloat16(rng.standard_normal((batch, out_side, out_side, O), np.float32)))
        flat = device_gpu.upload(rng.standard_normal(K * K * C * O, np.float32))
        device_gpu.register_shadow(flat)
        k.prepare_weights(flat, "bfloat16")
        weight, bias = flat.reshape(K, K, C, O), device_gpu.upload(np.zeros(O, np.float32))
        dweight, dbias = (device_gpu.upload(np.zeros(s, np.float32)) for s in (weight.shape, (O,)))

        def forward():
            return k.conv_forward(x, weight, bias, stride, pad)  # noqa: B023

        def backward():
            return k.conv_backward(dout, x, weight, stride, pad, dweight, dbias)  # noqa: B023

        def is_dx(source, kernel, defines):
            return defines.get("LAYOUT") == "NT"

        ms = dict(forward=ours(forward), dx=ours(backward, is_dx))
        ms["dweight"] = ours(backward, lambda *launch: not is_dx(*launch))  # with dbias and demb
        flop = 2 * batch * out_side**2 * K * K * C * O
        row = dict(H=H, C=C, O=O, K=K, stride=stride, batch=batch, ms=ms)
        device_gpu.backend().trim()  # what ours took in the recorded calls is PyTorch's now
        if torch:
            try:
                row["torch_ms"] = torch_conv(torch, batch, H, C, O, K, stride, pad, out_side)
            except Exception:  # out of memory, a PyTorch without CUDA: ours go on
                traceback.print_exc(limit=1)
        words = []
        for way, t in ms.items():
            rate = flop / t / 1e9
            row[f"{way}_tflops"] = round(rate, 1)
            if "torch_ms" in row:
                row[f"torch_{way}_tflops"] = round(flop / row["torch_ms"][way] / 1e9, 1)
                words.append(
                    f"{rate:7.1f} {flop / row['torch_ms'][way] / 1e9:7.1f} {row['torch_ms'][way] / t:5.2f}x"
                )
            else:
                words.append(f"{rate:22.1f}")
        print(f"  {f'{H} {C} {O} {K} {stride}':<22} {' '.join(f'{w:>22}' for w in words)}", flush=True)
        rows.append(row)
    return rows


def torch_conv(torch, batch, H, C, O, K, stride, pad, out_side):
    """Milliseconds of cuDNN's forward, dx and dweight (with dbias): like ours ten calls in a graph, so that
    the host's time for a call does not count."""

    def make(*shape):
        t = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return t.contiguous(memory_format=torch.channels_last)

    if pad[0] != pad[1]:  # PyTorch pads in a pass of its own, which is not counted here
        H, padding = H + sum(pad), 0
    else:
        padding = pad[0]
    x, w, dout = make(batch, C, H, H), make(O, C, K, K), make(batch, O, out_side, out_side)
    bias = torch.zeros(O, device="cuda", dtype=torch.bfloat16)

    def back(mask):
        return torch.ops.aten.convolution_backward(
            dout, x, w, [O], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, mask
        )

    calls = dict(
        forward=lambda: torch.nn.functional.conv2d(x, w, bias, stride, padding),
        dx=lambda: back([True, False, False]), dweight=lambda: back([False, True, True]),
    )  # fmt: skip
    ms = {}
    for name, call in calls.items():
        call(), torch.cuda.synchronize()  # cuDNN's choice of an algorithm cannot be captured
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = [call() for _ in range(10)]
        ms[name] = timed(recorded.replay, torch_event) / 10
        del out, recorded
    return ms


# ---- whole steps ----
def our_step(name, batch, dtype, sampling=False):
    """Milliseconds of a recorded training or sampling step, and the bytes that it takes."""
    import cupy

    config = nd.UNetConfig.from_dict(network(name))
    backend, size = device_gpu.backend(), config.sample_size
    gc.collect()
    backend.shadows.clear()  # of networks that are no more
    backend.trim()  # so that what comes now is all counted
    before = sum(m.size for m in backend.kept.values())
    model = nd.UNet(config, device="gpu", dtype=dtype)
    shape = (batch, size, size, config.in_channels)
    if sampling:
        steps = graph.Sampling(model, shape, 1.0, False)
        steps.begin(device_gpu.upload(np.zeros(shape, np.float32)), None)
        count = iter(range(10**9))

        def call():
            steps.step(next(count) % 1000, (1.0, -0.5, 0.9, 0.1, 0.0))
    else:
        opt = nd.Adam(model.params, clip=1.0, ema=0.999)
        images = np.random.default_rng(0).integers(0, 256, (2000, *shape[1:]), np.uint8)
        training = graph.Training(model, opt, nd.Diffusion(prediction="v"), images, None, batch, 0)
        count = iter(range(10**9))

        def call():
            training.step(next(count), 1e-4)

    ms = timed(lambda: [call() for _ in range(5)], cupy.cuda.Event, cupy.cuda.get_elapsed_time, 5.0) / 5
    return dict(side=f"nanodiff {dtype}", ms=ms, bytes=sum(m.size for m in backend.kept.values()) - before)


def torch_step(name, batch, precision, mode, sampling=False):
    """The same by PyTorch: baseline_torch.py, mean squared error, clipping, fused Adam, average of weights.

    precision  "bfloat16" (autocast) or "tf32";  mode: None for eager, or a mode of torch.compile
    """
    import baseline_torch
    import torch

    config = network(name)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model, place = baseline_torch.build(config, device="cuda", channels_last=True)
    if mode:
        model.compile(mode=None if mode == "default" else mode)
    size, C = config["sample_size"], config["in_channels"]
    alpha_bar = torch.tensor(nd.Diffusion().alpha_bar, device="cuda").float()
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16")
    x0 = place(torch.rand(batch, C, size, size) * 2 - 1)
    if sampling:

        @torch.inference_mode()
        def call():
            nonlocal x0
            t = torch.full((batch,), 500, device="cuda")
            with autocast:
                pred = model(x0, t).float()
            guess = (x0 - 0.5 * pred).clamp(-1, 1)
            x0 = 0.9 * guess + 0.1 * x0
    else:
        opt = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        weights = list(model.parameters())
        average = [p.detach().clone() for p in weights]

        def call():
            opt.zero_grad(set_to_none=True)  # first, so that the forward need not hold the gradients too
            t = torch.randint(1000, (batch,), device="cuda")
            a = alpha_bar[t].sqrt().view(-1, 1, 1, 1)
            s = (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
            eps = torch.randn_like(x0)
            with autocast:
                pred = model(a * x0 + s * eps, t)
            loss = torch.nn.functional.mse_loss(pred.float(), a * eps - s * x0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
            opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1e-3)

    begin = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter() - begin
    ms = timed(lambda: [call() for _ in range(5)], torch_event, seconds=5.0) / 5
    return dict(side=f"torch {precision} {mode or 'eager'}", ms=ms, bytes=torch.cuda.max_memory_allocated(),
                first_steps_s=round(start, 1))  # fmt: skip


def whole(name, batch, modes, sampling=False):
    """A row for each side, the fastest PyTorch's time over each."""
    sides = [lambda d=d: our_step(name, batch, d, sampling) for d in ("bfloat16", "float32")]
    sides += [
        lambda p=p, m=m: torch_step(name, batch, p, m, sampling)
        for p in ("bfloat16", "tf32")
        for m in (None, *modes)
        if p == "bfloat16" or m in (None, "default")
    ]
    rows = []
    for number, side in enumerate(sides):
        if late(f"side {number + 1} of {len(sides)} of {name}"):
            rows.append(dict(side="left out", error="time was up"))
            break
        try:
            rows.append(side())
        except Exception as error:  # out of memory, a compiler that is not there: the rest goes on
            traceback.print_exc(limit=1)
            rows.append(dict(side="failed", error=f"{type(error).__name__}: {error}"[:300]))
        row = rows[-1]
        if "ms" in row:
            print(f"  {row['side']:<32} {row['ms']:9.3f} ms {row['bytes'] / 1e9:7.2f} GB", flush=True)
    torch_ms = [r["ms"] for r in rows if "ms" in r and r["side"].startswith("torch")]
    for row in rows:
        if "ms" in row and torch_ms:
            row["best_torch_over_it"] = round(min(torch_ms) / row["ms"], 3)
    return dict(network=name, batch=batch, rows=rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--network", choices=("cifar10", "small", "mid64"), nargs="+", default=["cifar10", "small"]
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--modes",
        nargs="*",
        default=["default", "reduce-overhead"],
        help="of torch.compile (max-autotune is slow)",
    )
    parser.add_argument("--minutes", type=float, default=8, help="start nothing later (default: %(default)s)")
    parser.add_argument("--out", default="bench_gpu.json", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        backend = device_gpu.backend()
    except nd.NanodiffError as problem:
        print(f"gpu.py: {problem}", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    END[0] = begin + 60 * args.minutes
    result = dict(gpu=backend.name, capability=backend.capability, processors=backend.processors)
    result |= dict(cupy=backend.cupy.__version__, numpy=np.__version__, python=platform.python_version())
    try:
        import torch

        result |= dict(torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    except ImportError:
        print("PyTorch is not installed: nothing to compare with", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    work = {
        "correctness": lambda: [correctness()],
        "convs": lambda: [convs(args.batch)],
        "step": lambda: [whole(name, args.batch, args.modes) for name in args.network],
        "sample": lambda: [whole(name, args.batch, args.modes, True) for name in args.network],
    }
    for section in args.only:
        print(f"\n{section}", flush=True)
        try:
            result[section] = work[section]()
        except Exception as error:
            traceback.print_exc()
            result[section] = f"{type(error).__name__}: {error}"
        result["seconds"] = round(time.perf_counter() - begin, 1)
        Path(args.out).write_text(json.dumps(result, indent=1, default=float) + "\n")
    rows = result.get("correctness", [[]])
    print(json.dumps(result, default=float))
    return 1 if isinstance(rows, str) or not all(row["ok"] for row in rows[0]) else 0


if __name__ == "__main__":
    sys.exit(main())
