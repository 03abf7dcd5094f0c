"""The matrix products of the GPU on the emulator: every tile, and the choice among them."""

import shutil

import numpy as np
import pytest
from emulator import Emulator, from_bf16, to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff import testing
from nanodiff.kernels import conv_gpu, device_gpu, gemm_gpu
from nanodiff.kernels.device_gpu import BF16, download, upload
from nanodiff.kernels.gemm_gpu import TILES, choose_split, choose_tile, main_loop

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ALL = [tile for tiles in TILES.values() for tile in tiles]
# ragged in every direction for every tile; taps cross the stages of 64; more stages than are in flight
DIMS = dict(B=2, H=12, W=13, C=40, O=264, K=3, stride=1, pad=(1, 1), plus="er")


@pytest.fixture
def device(monkeypatch):
    def make(**options):
        monkeypatch.setattr(device_gpu, "_backend", Emulator(**options))

    return make


def rounded(a):
    return from_bf16(to_bf16(a))


def check_convolution(bf16, dims):
    """conv_forward and conv_backward on the device in use, against the definition in float64."""
    rng = np.random.default_rng(3)
    x, weight, bias, stride, pad, emb, residual = testing._conv(rng, testing.SimpleNamespace(**dims))
    send, narrow, get = upload, lambda a: a, download
    if bf16:
        x, weight, residual = rounded(x), rounded(weight), rounded(residual)
        send, narrow = (lambda a: upload(to_bf16(a))), rounded
        get = lambda a: from_bf16(download(a)) if a.dtype == BF16 else download(a)  # noqa: E731
    dout = narrow(rng.standard_normal(residual.shape, dtype=np.float32))
    dweight, dbias = np.ones_like(weight), np.ones_like(bias)
    expected = testing.run("ref", "conv_forward", [x, weight, bias, stride, pad, emb, residual], np.float64)
    expected += testing.run(
        "ref", "conv_backward", [dout, x, weight, stride, pad, dweight, dbias], np.float64
    )

    w, grads = upload(weight), [upload(dweight), upload(dbias)]
    out = conv_gpu.conv_forward(send(x), w, upload(bias), stride, pad, upload(emb), send(residual))
    actual = [out, *conv_gpu.conv_backward(send(dout), send(x), w, stride, pad, *grads), *grads]
    # results of type bfloat16 are rounded once: by at most 2^-9 of an element, 2^-9 / sqrt(3) in the mean;
    # the float32 ones are sums of some thousand products
    for what, a, e in zip(("out", "dx", "demb", "dweight", "dbias"), actual, expected, strict=True):
        error = 2.0**-9 if a.dtype == BF16 else testing.rounding(3000)
        testing.assert_close(get(a), e, error, what=what)


@needs_compiler
@pytest.mark.parametrize("tile", ALL, ids=lambda t: f"{t.main}-{t.BM}x{t.BN}")
def test_every_tile(tile, device, monkeypatch):
    device(order=7, capability=90 if tile.main == "WGMMA" else 80)
    monkeypatch.setitem(gemm_gpu.TILES, tile.main, (tile,))
    check_convolution(tile.main != "SIMT", DIMS)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(derandomize=True, max_examples=500, deadline=None)
def test_division_by_multiplication(d, n):
    factor, shift = gemm_gpu._divisor(d)
    assert factor < 2**32
    for m in {n, n // d * d, max(0, n // d * d - 1)}:  # where a quotient begins, and just before
        assert (2 * m * factor >> 32) >> shift == m // d


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 200_000), st.sampled_from(list(TILES)))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_parts_cover_the_sum(M, N, K, main):
    old, device_gpu._backend = device_gpu._backend, Emulator()
    try:
        tile, depth = choose_split(main, M, N, K)
    finally:
        device_gpu._backend = old
    parts = -(-K // depth)
    assert depth % 64 == 0 and (parts - 1) * depth < K <= parts * depth
    blocks = parts * -(-M // tile.BM) * -(-N // tile.BN)
    assert parts == 1 or blocks <= 132 * tile.resident  # one wave


@pytest.mark.parametrize(
    "main, M, N, want",
    [
        ("MMA", 128 * 32 * 32, 128, (128, 128)),  # DDPM's widest level at batch 128: many blocks
        ("MMA", 128 * 4 * 4, 256, (64, 64)),  # its smallest: 32 large blocks would leave 100 processors idle
        ("MMA", 128 * 32 * 32, 3, (128, 32)),  # to RGB
        ("WGMMA", 128 * 32 * 32, 128, (256, 128)),
        ("WGMMA", 128 * 4 * 4, 256, (64, 64)),
        ("SIMT", 128 * 32 * 32, 128, (64, 64)),
        ("SIMT", 128, 256, (32, 32)),  # a time embedding
    ],
)
def test_tile_choice(main, M, N, want, device):
    device(processors=132)
    tile = choose_tile(main, M, N, 1)
    assert (tile.BM, tile.BN) == want


def test_main_loop(device):
    """By type, width and machine alone: never by the number of rows, so that a batch does not change bits."""
    for capability, wide in ((75, "MMA"), (80, "MMA"), (90, "WGMMA"), (120, "MMA")):
        device(capability=capability)
        assert main_loop(BF16, 128) == wide and main_loop(BF16, 3) == "MMA"
        assert main_loop(np.dtype(np.float32), 128) == "SIMT"


@needs_compiler
def test_rows_do_not_depend_on_the_batch(device, monkeypatch):
    """Whatever tile the number of images leads to, the bits of an image are the same."""
    device(capability=80)
    rng = np.random.default_rng(0)
    x = upload(to_bf16(rng.standard_normal((3, 6, 6, 24), dtype=np.float32)))
    weight = upload(rng.standard_normal((3, 3, 24, 40), dtype=np.float32))
    bias = upload(rng.standard_normal(40, dtype=np.float32))
    outs = []
    for tile in TILES["MMA"]:
        monkeypatch.setitem(gemm_gpu.TILES, "MMA", (tile,))
        outs += [download(conv_gpu.conv_forward(x[:n], weight, bias, 1, (1, 1)))[0] for n in (1, 3)]
    assert all(np.array_equal(a, outs[0]) for a in outs)
