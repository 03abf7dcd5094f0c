"""Every CUDA source through NVRTC, as the package compiles it, for each architecture; no GPU is needed.

Which modules (a source and its defines) and which launches there are is recorded: from a CIFAR-10 training
step at batch 128, and from every CASE.
"""

import functools
import io
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from emulator import to_bf16
from host_backend import Recorder
from test_gpu_kernels import BF16_OPS, GPU, names, narrow
from test_gpu_runtime import cifar10

import nanodiff as nd
from nanodiff import graph
from nanodiff.kernels import device_gpu, gemm_gpu
from nanodiff.testing import CASES

try:
    from cupy.cuda import compiler, nvrtc

    nvrtc.getVersion()
    missing = None
except Exception as error:  # CuPy, or the library that it looks for
    missing = f"needs cupy and nvidia-cuda-nvrtc ({error})"

ARCHITECTURES = {
    "75": 75,
    "80": 80,
    "86": 86,
    "89": 89,
    "90": 80,
    "90a": 90,
    "120": 120,
}  # and who launches so
REGISTERS = 65536  # of a multiprocessor
# Registers of a thread, at most. gemm: by tile; the others run blocks of 256 to 512 threads.
BUDGETS = {"SIMT": 128, "MMA 128x128": 255, "MMA 128x64": 168, "MMA 64x64": 128, "MMA 128x32": 168,
           "WGMMA 128x256": 255, "WGMMA 256x128": 255, "WGMMA 128x128": 128, "WGMMA 128x64": 128,
           "WGMMA 64x64": 128, "other": 128}  # fmt: skip


@pytest.fixture(autouse=True)
def cupy_again():
    yield
    device_gpu.use(None)


@functools.cache
def launches_of_a_step(capability):
    device_gpu.use(recorder := Recorder(capability))
    model = nd.UNet(cifar10(), device="gpu", dtype="float32" if capability < 80 else None)
    opt = nd.Adam(model.params, clip=1.0, ema=0.9999)
    graph.Training(model, opt, nd.Diffusion(), np.zeros((256, 32, 32, 3), np.uint8), None, 128, 0)
    return recorder.calls


@functools.cache
def launches_of_cases(capability):
    device_gpu.use(recorder := Recorder(capability))
    for bf16 in (False, True)[: 1 + (capability >= 80)]:
        for op in BF16_OPS if bf16 else CASES:
            for dims in CASES[op].shapes:
                arguments = zip(names(op), CASES[op].arguments(dims))
                arrays = [to_bf16(a) if bf16 and narrow(op, name, a) else a for name, a in arguments]
                getattr(GPU, op)(*(device_gpu.upload(a) if isinstance(a, np.ndarray) else a for a in arrays))
    return recorder.calls


def modules(arch):
    """{(source, defines): [launches]}: for sm_75 and 90a of the CASES too; for those like sm_80, of the
    products of matrices one for each tile and layout."""
    capability = ARCHITECTURES[arch]
    calls, made = launches_of_a_step(capability), {}
    if arch in ("75", "90a"):
        calls = calls + launches_of_cases(capability)
    for call in calls:
        made.setdefault((call[0], call[6]), []).append(call)
    if arch in ("75", "80", "90a"):
        return made
    some = {}
    for source, defines in made:
        d = dict(defines)
        some.setdefault(
            (source, d.get("LAYOUT"), d.get("BM"), d.get("BN")) if "BM" in d else (source, defines),
            (source, defines),
        )
    return {key: made[key] for key in some.values()}


def compiled(arch, source, defines):
    """{kernel: (registers, bytes of shared memory, bytes of stack and spills)} and the compiler's log."""
    log = io.StringIO()
    program = compiler._NVRTCProgram(device_gpu.source_text(source), source, method="cubin")
    macros = (f"-D{name}={value}" for name, value in defines)
    cupys = "-ftz=true", f"-arch=sm_{arch.rstrip('a')}", "--device-as-default-execution-space"
    ours = ("-arch=sm_90a",) if arch == "90a" else ()
    program.compile(("-std=c++17", *ours, *macros, *cupys, "--ptxas-options=-v"), log)
    text, found = log.getvalue(), {}
    for part in re.split("Compiling entry function ", text)[1:]:
        used = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill|cumulative)", part)]
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[re.match(r"'(\w+)'", part)[1]] = registers, int(shared[1]) if shared else 0, sum(used)
    return found, text


@pytest.mark.skipif(missing is not None, reason=str(missing))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_source_compiles_within_its_budget(arch):
    made = modules(arch)
    assert {source for source, _ in made} == {p.name for p in device_gpu.HERE.glob("*.cu")}
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda key: compiled(arch, *key), made)
        for ((source, defines), calls), (kernels, log) in zip(made.items(), results, strict=True):
            d = dict(defines)
            what = f"sm_{arch} {source} {d}"
            # C7515: ptxas waits after every wgmma; any other warning is a surprise too
            assert "C7515" not in log and "warning" not in log.lower(), f"{what}: {log[:2000]}"
            for kernel, (registers, shared, local) in kernels.items():
                assert local == 0, f"{what} {kernel}: {local} bytes of stack or spilled registers"
                tile = (
                    d.get("MAIN")
                    if d.get("MAIN") == "SIMT"
                    else f"{d.get('MAIN')} {d.get('BM')}x{d.get('BN')}"
                )
                budget = BUDGETS["other" if kernel != "gemm" else tile]
                assert registers <= budget, f"{what} {kernel}: {registers} registers, budget {budget}"
                for *_, block, _, smem, _ in (c for c in calls if c[1] == kernel):
                    blocks, most = d.get("BLOCKS", 1), 227 if arch == "90a" else 64 if arch == "75" else 99
                    rounded = -(-registers // 8) * 8  # as they are handed out
                    assert rounded * int(np.prod(block)) * blocks <= REGISTERS, f"{what} {kernel} {block}"
                    assert shared + smem <= most << 10, (
                        f"{what} {kernel}: {shared + smem} bytes of shared memory"
                    )


def test_tiles_fit():
    """A tile's blocks fit beside each other into the shared memory of sm_90; 1 KB a block is the system's."""
    for main, limit, together in (("SIMT", 64, 228), ("MMA", 99, 228), ("WGMMA", 227, 228)):
        for tile in gemm_gpu.TILES[main]:
            assert tile.shared() <= limit << 10
            assert tile.resident * (tile.shared() + 1024) <= together << 10
            assert tile.threads * tile.resident <= 2048
