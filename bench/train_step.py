"""The whole training step, nanodiff against PyTorch: forward, mean squared error, backward, Adam.

    python bench/train_step.py --network small                      # nanodiff and two PyTorch modes in turns
    python bench/train_step.py --network all --compile --forward-only --sampling
    python bench/train_step.py --forward-only --engines             # OpenVINO and ONNX Runtime too
    python bench/train_step.py --cold --warm                        # start-up times instead

Every turn of every side is a process of its own, with `--threads` threads; sides take turns A B C A B C; the
median over all steps of all turns counts. Float32, random data, no clipping, no EMA; PyTorch's Adam is fused.
--sampling is one batch by DDIM in 50 steps; engines, which only infer, are told to compute in float32.
The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KINDS, ENGINES = ("step", "forward", "sampling"), ("openvino", "onnxruntime")
STEPS = 50  # of DDIM
BATCH = {"cifar10": 8, "small": 32, "mid64": 8}
NETWORKS = {
    "cifar10": dict(  # google/ddpm-cifar10-32, 35.7M weights
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ),
    "small": dict(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ),
    "mid64": dict(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(64, 128, 128, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ),
}


def random_batch(config, batch):
    """x, target (B,H,W,C) float32 and t (B,)"""
    rng = np.random.default_rng(0)
    shape = (2, batch, config["sample_size"], config["sample_size"], config["in_channels"])
    x, target = rng.standard_normal(shape, dtype=np.float32)
    return x, target, rng.integers(0, 1000, batch)


def nanodiff_side(config, batch):
    """{kind: what to time}, the context that all but steps run in, versions"""
    import numba

    import nanodiff as nd

    model = nd.UNet(nd.UNetConfig.from_dict(config))
    opt = nd.Adam(model.params, lr=1e-4)
    x, target, t = random_batch(config, batch)
    x, target = model.ctx.to_device(x), model.ctx.to_device(target)

    def step():
        loss = model.loss_and_grad(x, t, target)
        opt.step()
        return float(loss[0])

    versions = {"nanodiff": nd.__version__, "numba": numba.__version__}
    calls = {
        "step": step,
        "forward": lambda: model.predict(x, t),
        "sampling": lambda: nd.ddim_sample(model, nd.Diffusion(), x.shape, steps=STEPS),
    }
    return calls, model.frozen(), versions


def ddim(model, x):
    """What nd.ddim_sample does, on PyTorch's tensors."""
    import torch

    import nanodiff as nd

    diff = nd.Diffusion()
    for t, p in nd.step_list(diff.timesteps, STEPS):
        wx, wp = diff.x0_weights(diff.alpha_bar[t] ** 0.5, (1 - diff.alpha_bar[t]) ** 0.5)
        w0, w, _ = diff.step_back(t, p, 0.0)
        x = w0 * (wx * x + wp * model(x, torch.full((len(x),), t))).clip(-1, 1) + w * x
    return x


def torch_side(config, batch, channels_last, compiled, threads):
    """As nanodiff_side."""
    import baseline_torch
    import torch

    torch.set_num_threads(threads)
    model, place = baseline_torch.build(config, channels_last=channels_last, compiled=compiled)
    opt = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x, target, t = (torch.from_numpy(a) for a in random_batch(config, batch))
    x, target = (place(a.permute(0, 3, 1, 2)) for a in (x, target))

    def step():
        loss = torch.nn.functional.mse_loss(model(x, t), target)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        return loss.item()

    calls = {"step": step, "forward": lambda: model(x, t), "sampling": lambda: ddim(model, x)}
    return calls, torch.inference_mode(), {"torch": torch.__version__}


def engine_side(name, config, batch, threads):
    """As nanodiff_side, of an engine that only infers, given PyTorch's network; its answer is checked."""
    import baseline_torch
    import torch

    model, _ = baseline_torch.build(config, channels_last=False, compiled=False)
    model.eval()
    x, _, t = random_batch(config, batch)
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    inputs = torch.from_numpy(x), torch.from_numpy(t)
    with torch.inference_mode():
        expected = model(*inputs).numpy()
    if name == "openvino":
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        graph = openvino.convert_model(model, example_input=inputs)
        compiled = openvino.compile_model(graph, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})
        version = openvino.__version__.split("-")[0]

        def forward():
            return compiled([x, t])[0]
    else:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/unet.onnx"
            torch.onnx.export(model, inputs, path, dynamo=True, verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names, version = [i.name for i in session.get_inputs()], onnxruntime.__version__

        def forward():
            return session.run(None, dict(zip(names, (x, t))))[0]

    off = np.linalg.norm(forward() - expected) / np.linalg.norm(expected)
    if not off < 1e-3:
        sys.exit(f"{name} answers something else than PyTorch: off by {off:.1e}")
    return {"forward": forward}, contextlib.nullcontext(), {name: version, "torch": torch.__version__}


def timed(call, warmup, count):
    """Milliseconds of each of `count` calls after `warmup` calls that are not counted."""
    times = []
    for _ in range(warmup + count):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[warmup:]


def run_side(args):
    """One turn of one side, in this process; prints its JSON."""
    config = NETWORKS[args.network]
    if args.side == "nanodiff":
        calls, inference, versions = nanodiff_side(config, args.batch)
    elif args.side in ENGINES:
        calls, inference, versions = engine_side(args.side, config, args.batch, args.threads)
    else:
        layout, compiled = "channels_last" in args.side, "compile" in args.side
        calls, inference, versions = torch_side(config, args.batch, layout, compiled, args.threads)
    out = {"step": timed(calls["step"], args.warmup, args.steps)} if "step" in calls else {}
    out["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with inference:
        if args.forward_only:
            out["forward"] = timed(calls["forward"], args.warmup, args.steps)
        if args.sampling and "sampling" in calls:
            out["sampling"] = timed(calls["sampling"], 0, 2)
    print(json.dumps(out | {"versions": versions | {"numpy": np.__version__}}))


def run_first_step():
    """The default model's first step, batch 32, with clipping and EMA; prints the clock at its end."""
    import nanodiff as nd

    model = nd.UNet(nd.UNetConfig())
    opt = nd.Adam(model.params, clip=1.0, ema=0.999)
    size = model.config.sample_size or 32
    x0 = np.random.default_rng(0).uniform(-1, 1, (32, size, size, model.config.in_channels))
    loss = float(nd.train_step(model, opt, nd.Diffusion(), model.ctx.to_device(x0), key=(0, 0)))
    print(json.dumps({"end": time.monotonic(), "loss": loss, "weights": model.params.count}))


def environment(threads, **more):
    """Same thread count and the repository first on the path, for a process of either side."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"PYTHONPATH": path} | more


def child(options, threads, **env):
    """The JSON object that another process of this script prints last."""
    command = [sys.executable, __file__, *map(str, options), "--threads", str(threads)]
    done = subprocess.run(command, env=environment(threads, **env), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the process for {' '.join(map(str, options))} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(network, batch, args):
    """Time all sides of one network in turns; prints the table, returns a dict for the JSON."""
    modes = ["torch", "torch channels_last"]
    if args.compile:
        modes += [f"{mode} compile" for mode in modes]
    if args.engines and args.forward_only:
        modes += [name for name in ENGINES if importlib.util.find_spec(name)]
    sides = [side for side in ("nanodiff", *modes) if args.only is None or side in args.only]
    runs = {side: [] for side in sides}
    options = ["--network", network, "--batch", batch, "--steps", args.steps, "--warmup", args.warmup]
    for turn in range(args.turns):
        for side in sides:
            more = ["--forward-only"] * args.forward_only + ["--sampling"] * args.sampling
            runs[side].append(child([*options, "--side", side, *more], args.threads))
            said = [
                f"{kind} {statistics.median(runs[side][-1][kind]):.1f} ms"
                for kind in KINDS
                if kind in runs[side][-1]
            ]
            print(f"turn {turn + 1}: {side}: {', '.join(said)}", file=sys.stderr)

    size, channels = NETWORKS[network]["sample_size"], NETWORKS[network]["in_channels"]
    shape = f"{batch}x{size}x{size}x{channels}"
    print(f"\n{network}, {shape}, {args.turns} turns of {args.steps} steps after {args.warmup}")
    result = {"network": network, "batch": batch, "sides": {}}
    for kind in KINDS:
        have = [s for s in sides if kind in runs[s][0]]
        if not have:
            continue
        medians = {s: statistics.median(ms for run in runs[s] for ms in run[kind]) for s in have}
        best = min((medians[s] for s in have if s.startswith("torch")), default=float("nan"))
        print(
            f"  {kind:<28} {'ms':>9} {'turns: lowest .. highest':>26} {'best torch / it':>16} {'peak MB':>8}"
        )
        for s in have:
            turns = sorted(statistics.median(run[kind]) for run in runs[s])
            rss = max(run["rss_mb"] for run in runs[s])
            spread = f"{turns[0]:.1f} .. {turns[-1]:.1f}"
            print(f"  {s:<28} {medians[s]:9.1f} {spread:>26} {best / medians[s]:15.2f}x {rss:8.0f}")
            side = result["sides"].setdefault(s, {"rss_mb": round(rss)})
            side |= {f"{kind}_ms": round(medians[s], 2), f"{kind}_ms_turns": [round(ms, 2) for ms in turns]}
        if "nanodiff" in have and best == best:
            result[f"{kind}_ratio"] = round(best / medians["nanodiff"], 3)
    result["versions"] = {k: v for s in sides for k, v in runs[s][0]["versions"].items()}
    return result


def start_times(args):
    """Seconds from process start to the end of the first training step (cold and warm), and of --help."""

    def first_step(**env):
        begin = time.monotonic()  # one clock for all processes of a machine
        out = child(["--side", "first-step"], args.threads, **env)
        return out["end"] - begin

    with tempfile.TemporaryDirectory(prefix="nanodiff-cold-") as folder:
        env = {"NUMBA_CACHE_DIR": folder} if args.cold else {}
        filling = first_step(
            **env
        )  # compiles; with --warm alone it fills the usual cache where that is needed
        seconds = {"cold_s": round(filling, 2)} if args.cold else {}
        if args.warm:
            seconds["warm_s"] = round(statistics.median(first_step(**env) for _ in range(args.turns)), 2)
    help_times = []
    for _ in range(5):
        begin = time.monotonic()
        command = [sys.executable, "-m", "nanodiff", "--help"]
        subprocess.run(command, env=environment(args.threads), stdout=subprocess.DEVNULL, check=True)
        help_times.append(time.monotonic() - begin)
    seconds["help_s"] = round(statistics.median(help_times), 3)
    limits = {"cold_s": 30, "warm_s": 3, "help_s": 0.2}
    for name, value in seconds.items():
        verdict = "PASS" if value < limits[name] else "FAIL"
        print(f"{name:<8} {value:7.2f} s   limit {limits[name]:4} s   {verdict}")
    return seconds


def cpu_name():
    """The processor's name, as the kernel of the operating system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--batch", type=int, help="default: 8 for cifar10 and mid64, 32 for small")
    parser.add_argument("--turns", type=int, default=3, help="processes per side (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="counted steps per turn (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forward-only", action="store_true", help="also measure the forward as in sampling")
    parser.add_argument("--sampling", action="store_true", help="also a batch by DDIM in 50 steps")
    parser.add_argument("--engines", action="store_true", help="with --forward-only: OpenVINO, ONNX Runtime")
    parser.add_argument("--compile", action="store_true", help="add PyTorch's compiled modes")
    parser.add_argument(
        "--only", nargs="+", metavar="SIDE", help='for example: --only torch "torch channels_last"'
    )
    parser.add_argument("--cold", action="store_true", help="measure the start with an empty Numba cache")
    parser.add_argument("--warm", action="store_true", help="measure the start with a filled Numba cache")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "first-step":
        return run_first_step()
    if args.side:
        return run_side(args)

    result = {"cpu": cpu_name(), "threads": args.threads, "python": platform.python_version()}
    result["load"] = round(
        os.getloadavg()[0], 2
    )  # of others, before the first turn: near 0 on a machine fit to measure on
    if args.cold or args.warm:
        result["start"] = start_times(args)
    else:
        chosen = list(NETWORKS) if args.network == "all" else [args.network]
        result["networks"] = [compare(name, args.batch or BATCH[name], args) for name in chosen]
        versions = result["networks"][0]["versions"]
        print(
            "\n"
            + ", ".join(
                [result["cpu"], f"{args.threads} threads"] + [f"{k} {v}" for k, v in versions.items()]
            )
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
