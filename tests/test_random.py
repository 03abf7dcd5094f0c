"""Philox against its published vectors, the normals against float64 and their distribution, CPU = ref."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodiff.kernels import parallel_cpu, random_cpu, random_ref
from nanodiff.kernels.random_ref import NOISE, SAMPLE, box_muller, normal, philox, random_bits

RENDITIONS = pytest.mark.parametrize("rendition", [random_ref, random_cpu], ids=["ref", "cpu"])
ONES = 0xFFFFFFFF
VECTORS = [  # counter, key, words: "philox4x32 10" in kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_philox_gives_the_published_words(counter, key, words):
    u64 = np.uint64
    out = philox(*(np.array([c], u64) for c in counter), *map(u64, key))
    assert [w.item() for w in out] == list(words)


@RENDITIONS
def test_counter_is_element_sample_step_purpose_and_key_is_seed(rendition):
    assert rendition.random_bits((1, 4), 0, 0, 0)[0].tolist() == list(VECTORS[0][2])
    u64 = np.uint64
    bits = rendition.random_bits((3, 2, 7, 3), 5 + (9 << 32), 11, 3, first=20).reshape(3, 42)
    for i, e in ((0, 0), (1, 5), (2, 41)):
        words = philox(*(np.array([c], u64) for c in (e // 4, 20 + i, 11, 3)), u64(5), u64(9))
        assert bits[i, e] == words[e % 4].item()


def test_a_million_normals_are_the_same_bits_on_the_cpu():
    a, b = normal((4, 1 << 18), 123, 7, NOISE), random_cpu.normal((4, 1 << 18), 123, 7, NOISE)
    assert a.dtype == b.dtype == np.float32
    assert np.array_equal(a.view(np.uint32), b.view(np.uint32))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
    purpose=st.integers(0, 1000),
    first=st.integers(0, 2**32 - 1),
)
def test_cpu_is_ref_for_any_shape_and_counter(shape, seed, step, purpose, first):
    shape = tuple(shape)
    for name in random_ref.__all__:
        a = getattr(random_ref, name)(shape, seed, step, purpose, first)
        b = getattr(random_cpu, name)(shape, seed, step, purpose, first)
        assert a.shape == b.shape == shape and a.dtype == b.dtype and b.flags.c_contiguous
        assert a.tobytes() == b.tobytes()


@RENDITIONS
def test_a_sample_depends_on_its_own_number_alone(rendition):
    whole = rendition.normal((16, 8, 8, 3), 1, 2, SAMPLE)
    parts = [rendition.normal((n, 8, 8, 3), 1, 2, SAMPLE, first=k) for k, n in ((0, 5), (5, 10), (15, 1))]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.fixture
def restore_threads():
    before = parallel_cpu._threads
    yield
    parallel_cpu.set_threads(before)


def test_threads_change_nothing(restore_threads):
    words = []
    for threads in range(1, parallel_cpu.max_threads() + 1):
        parallel_cpu.set_threads(threads)
        words.append(random_cpu.random_bits((3, 50_001), 4, 5, 6))
    assert all(np.array_equal(words[0], w) for w in words)


def test_every_argument_changes_the_words():
    base = dict(seed=1, step=2, purpose=3, first=4)
    seen = [random_bits((4, 100), **base)]
    seen += [random_bits((4, 100), **(base | {k: base[k] + 100})) for k in base]
    seen.append(random_bits((4, 100), **(base | {"seed": 1 + (1 << 32)})))
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert (a == b).mean() < 0.05  # 400 words of 2^32 values: not even one is expected to agree


def test_box_muller_against_float64():
    """Every exponent of u, every quadrant, all the corners. The bound is a few rounding errors of 6.66."""
    words = random_bits((1, 1 << 18), 0, 0, NOISE)[0]
    corners = [0, 1, 2, 3, ONES, ONES - 1] + [(1 << k) + d for k in range(1, 32) for d in (-1, 0, 1)]
    w0 = np.concatenate([words[::2] >> (words[1::2] % 32), np.repeat(corners, len(corners))]).astype(
        np.uint32
    )
    w1 = np.concatenate([words[1::2], np.tile(corners, len(corners))]).astype(np.uint32)
    z0, z1 = box_muller(w0, w1)
    u = ((w0 >> 1).astype(np.float32) * np.float32(2.0**-31) + np.float32(2.0**-32)).astype(np.float64)
    assert 0 < u.min() and u.max() == 1
    r, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * (w1 / 2.0**32)
    assert np.abs(z0 - r * np.cos(angle)).max() < 1e-6 and np.abs(z1 - r * np.sin(angle)).max() < 1e-6
    assert max(np.abs(z0).max(), np.abs(z1).max()) < 6.67
    some = r > 0  # cos and sin alone, and the radius: a few ulp, so small normals are right too
    assert np.abs(z0[some] / r[some] - np.cos(angle[some])).max() < 3e-7
    assert np.abs(np.hypot(z0[some], z1[some], dtype=np.float64) / r[some] - 1).max() < 4e-7


def test_normals_are_normal():
    """2^20 of them: moments within 5 standard errors; tails by their counts; no neighbours correlated."""
    z = random_cpu.normal((64, 1 << 14), 2024, 0, NOISE).astype(np.float64)
    n = z.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5 * np.sqrt(variance / n)
    for limit, tail in ((1, 0.3173105), (2, 0.04550026), (3, 0.002699796), (4, 6.334248e-5)):
        assert abs((np.abs(z) > limit).sum() - n * tail) < 5 * np.sqrt(n * tail)
    flat = z.ravel()
    for lag in (1, 2, 3, 4, 1 << 14):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / np.sqrt(n)


def test_uniform_bits_are_balanced():
    bits = np.unpackbits(random_bits((1, 1 << 16), 3, 0, NOISE)[0].view(np.uint8)).reshape(-1, 32)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(1 << 16)
