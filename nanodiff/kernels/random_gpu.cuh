// Philox4x32-10 and normals by Box and Muller: random_ref.py's, bit for bit. Every operation is spelled out
// as one that rounds once, so that no compiler contracts two into a fused multiply-add.
#pragma once
#include "device_gpu.cuh"

__device__ __forceinline__ void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint32_t h0 = __umulhi(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
    uint32_t h1 = __umulhi(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
    c[0] = h1 ^ c[1] ^ k0, c[1] = l1, c[2] = h0 ^ c[3] ^ k1, c[3] = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
template <int N> __device__ __forceinline__ float horner(const float (&c)[N], float x) {
  float out = c[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; i--) out = plus(mul(out, x), c[i]);
  return out;
}

// Two words become the bits of two normals
__device__ __forceinline__ void box_muller(uint32_t& w0, uint32_t& w1) {
  const float LOG[] = {0.3333333f, -0.2500082f, 0.20001227f, -0.16623357f,
                       0.14201757f, -0.13160183f, 0.12761578f, -0.076344974f};
  const float SIN[] = {0.7853981f, -0.08074537f, 0.002489872f, -3.587726e-05f};
  const float COS[] = {-0.30842513f, 0.015854327f, -0.000325942f, 3.5313346e-06f};
  const float u = plus(mul((float)(int)(w0 >> 1), 4.656612873e-10f), 2.328306437e-10f);  // 2^-31, 2^-32
  const int bits = __float_as_int(u) - 0x3F3504F3;
  const float e = (float)(bits >> 23);  // u = (1 + f) 2^e
  const float f = plus(__int_as_float((bits & 0x7FFFFF) + 0x3F3504F3), -1.f), ff = mul(f, f);
  float log = plus(mul(mul(horner(LOG, f), f), ff), mul(e, -2.12194440e-4f));
  log = plus(plus(f, plus(log, -mul(0.5f, ff))), mul(e, 0.693359375f));
  const float r = __fsqrt_rn(mul(-2.f, log));

  const float t = mul((float)((int)(w1 << 2) >> 2), 1.862645149e-9f), tt = mul(t, t);  // 2^-29
  const uint32_t quadrant = (w1 + (1u << 29)) >> 30;
  const float s = mul(t, horner(SIN, tt)), c = plus(1.f, mul(tt, horner(COS, tt)));
  float x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
  if ((quadrant + 1) & 2) x = -x;
  if (quadrant & 2) y = -y;
  w0 = __float_as_uint(mul(r, x)), w1 = __float_as_uint(mul(r, y));
}

// A thread's counter: words for four elements of one sample, fewer at the end of a sample of `size` elements
struct Draw {
  uint32_t word[4], sample, left;
  size_t at;  // the first of its elements
  __device__ Draw(uint32_t size, uint64_t seed, const uint32_t* step_at, uint32_t step, uint32_t purpose,
                  uint32_t first) {  // step_at: where the step lies that changes between replays, or null
    const uint32_t counters = (size + 3) / 4, i = global_index();
    sample = i / counters;
    const uint32_t j = i - sample * counters;
    at = (size_t)sample * size + 4 * j, left = size - 4 * j;
    word[0] = j, word[1] = first + sample, word[2] = step_at ? *step_at : step, word[3] = purpose;
    philox(word, seed);
  }
};
