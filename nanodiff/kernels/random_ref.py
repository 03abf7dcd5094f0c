"""Counter-based random numbers: Philox4x32-10 words and normals, the same bits in every rendition.

No state: word e % 4 of counter (e // 4, first + i, step, purpose) under key `seed` belongs to element e of
sample i, so a sample depends on its own index alone, not on the batch, thread or device that draws it.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Normals: Box and Muller (1958)
in float32, by correctly rounded + - * / sqrt and bit operations only; log, sin and cos are the polynomials
below, since no two libraries round theirs alike. Nothing may be contracted into a fused multiply-add. The
coefficients are weighted minimax fits (Lawson's iteration on Chebyshev nodes in float64), rounded to float32.
"""

import math

import numpy as np

__all__ = ["random_bits", "normal"]

# the purposes: streams that never meet
NOISE, TIME, DROPOUT, SAMPLE, START, ORDER, FLIP, INIT, DATA, OFFSET, LABEL, BOUND = range(12)

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # what the two key words grow by each round

f32 = np.float32
# log(1 + f) = f - f^2/2 + f^3 LOG(f), f in [sqrt(1/2) - 1, sqrt(2) - 1]; relative error 6e-9
LOG = (0.3333333, -0.2500082, 0.20001227, -0.16623357, 0.14201757, -0.13160183, 0.12761578, -0.076344974)
# sin(pi/4 t) = t SIN(t^2) and cos(pi/4 t) = 1 + t^2 COS(t^2), |t| <= 1; errors 1.2e-9 and 6e-11
SIN = (0.7853981, -0.08074537, 0.002489872, -3.587726e-05)
COS = (-0.30842513, 0.015854327, -0.000325942, 3.5313346e-06)
LOG, SIN, COS = (tuple(map(f32, c)) for c in (LOG, SIN, COS))
LN2_HI, LN2_LO = f32(0.693359375), f32(-2.12194440e-4)  # e * LN2_HI is exact: nine bits times six
SQRT_HALF = np.int32(0x3F3504F3)  # the bit pattern of the float32 sqrt(1/2)

CHUNK = 1 << 14  # counters at a time: the temporaries stay in the cache


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of counters and keys given as uint64 arrays of 32-bit values; four words of each."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1 = map(np.uint64, MULTIPLIERS)
    for _ in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(WEYL[0])) & low, (k1 + np.uint64(WEYL[1])) & low
    return c0, c1, c2, c3


def box_muller(w0, w1):  # (n,) uint32, (n,) uint32 -> (n,) float32, (n,) float32
    """Two independent normals from two words; |z| <= 6.66.

    u = (w0 // 2 + 1/2) / 2^31, rounded to float32, lies in (0, 1]; the angle 2 pi w1 / 2^32 is taken as a
    quadrant and a remainder of at most pi/4. Absolute error against the exact value: below 1e-6.
    """
    u = (w0 >> np.uint32(1)).astype(f32) * f32(2.0**-31) + f32(2.0**-32)
    bits = u.view(np.int32) - SQRT_HALF
    e = (bits >> 23).astype(f32)  # u = (1 + f) 2^e
    f = ((bits & np.int32(0x7FFFFF)) + SQRT_HALF).view(f32) - f32(1)
    ff = f * f
    log = f + (horner(LOG, f) * f * ff + e * LN2_LO - f32(0.5) * ff) + e * LN2_HI
    r = np.sqrt(f32(-2) * log)

    t = ((w1 << np.uint32(2)).view(np.int32) >> 2).astype(f32) * f32(2.0**-29)
    quadrant = (w1 + np.uint32(1 << 29)) >> np.uint32(30)
    tt = t * t
    s, c = t * horner(SIN, tt), f32(1) + tt * horner(COS, tt)
    odd = (quadrant & np.uint32(1)).astype(bool)
    c, s = np.where(odd, s, c), np.where(odd, c, s)
    c = np.where((quadrant + np.uint32(1)) & np.uint32(2), -c, c)
    s = np.where(quadrant & np.uint32(2), -s, s)
    return r * c, r * s


def horner(coefficients, x):
    out = coefficients[-1]
    for c in coefficients[-2::-1]:
        out = out * x + c
    return out


def fill(shape, seed, step, purpose, first, convert):
    """Words of `shape` passed through `convert`, columns of four; a sample's last ones may be cut off."""
    samples, size = shape[0], math.prod(shape[1:])
    counters = -(-size // 4)  # per sample
    low, u64 = 0xFFFFFFFF, np.uint64
    out = np.empty((samples * counters, 4), np.uint32)
    for start in range(0, samples * counters, CHUNK):
        n = np.arange(start, min(start + CHUNK, samples * counters), dtype=u64)
        i = (n // u64(counters) + u64(first)) & u64(low)
        words = philox(
            n % u64(counters), i, u64(step & low), u64(purpose), u64(seed & low), u64(seed >> 32 & low)
        )
        out[start : start + CHUNK] = np.stack(convert(*(w.astype(np.uint32) for w in words)), axis=-1)
    return np.ascontiguousarray(out.reshape(samples, 4 * counters)[:, :size]).reshape(shape)


def random_bits(shape, seed, step, purpose, first=0):
    """Uniform uint32 words of `shape`. shape[0] counts samples: these are numbers first, first + 1, ...

    seed is a 64-bit unsigned integer, step and first are 32-bit ones, purpose is one of the constants above.
    """
    return fill(shape, seed, step, purpose, first, lambda *words: words)


def normal(shape, seed, step, purpose, first=0):
    """Standard normals of `shape`, float32; arguments as in `random_bits`.

    Elements 4j and 4j + 1 come from words 0 and 1 of counter j, the next two from words 2 and 3.
    """

    def convert(w0, w1, w2, w3):
        return [z.view(np.uint32) for z in (*box_muller(w0, w1), *box_muller(w2, w3))]

    return fill(shape, seed, step, purpose, first, convert).view(f32)
