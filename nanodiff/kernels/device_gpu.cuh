// What every kernel stands on: element types, loads and stores of 16 bytes, reductions, activations. No
// system headers, so that NVRTC needs none. Under g++ the tests supply CUDA's side (tests/cpu_cuda.h), and
// beside every machine instruction stands its twin in plain C++. Arrays start at multiples of 16 bytes.
#pragma once
#ifdef __CUDACC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define DYN_SMEM(name) extern __shared__ __align__(1024) char name[]
#define EXPORT(...)
#else
#include "cpu_cuda.h"
#endif
typedef uint16_t bf16;  // a bfloat16 is the upper half of a float
#ifndef ELEMENT
#define ELEMENT float
#endif
typedef ELEMENT T;  // -DELEMENT=float or =bf16; -DT=float would break NVRTC's own header

// ---- elements: memory holds T, arithmetic is in float ----
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(double v) { return (float)v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((unsigned)v << 16); }
#ifdef __CUDACC__
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else  // sm_75 never runs this; it only has to compile
  return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
#endif
}
#else
inline unsigned round_bf16(float v) {  // to nearest, ties to even
  unsigned u = __float_as_uint(v);
  return v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline unsigned pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
#endif
template <class V> __device__ __forceinline__ V from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ double from_float<double>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return (bf16)pack_bf16(v, 0); }

// N elements from p into floats, and back, by up to 16 bytes at once: p must be aligned so
template <class E, int N, int BYTES = N * sizeof(E)>
struct alignas(BYTES % 16 == 0 ? 16 : BYTES % 8 == 0 ? 8 : sizeof(E)) Pack { E at[N]; };
template <int N, class E> __device__ __forceinline__ void load(const E* p, float (&v)[N]) {
  const Pack<E, N> q = *(const Pack<E, N>*)p;
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = to_float(q.at[i]);
}
template <int N, class E> __device__ __forceinline__ void store(E* p, const float (&v)[N]) {
  Pack<E, N> q;
#pragma unroll
  for (int i = 0; i < N; i += 1 + (sizeof(E) == 2 && N > 1))
    if constexpr (sizeof(E) == 2 && N > 1) *(unsigned*)(q.at + i) = pack_bf16(v[i], v[i + 1]);
    else q.at[i] = from_float<E>(v[i]);
  *(Pack<E, N>*)p = q;
}
// The same for the last elements of an array: `left` of them, the others read as 0 and are not written
template <int N, class E> __device__ __forceinline__ void load_some(const E* p, size_t left, float (&v)[N]) {
  if (left >= N) return load(p, v);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = (size_t)i < left ? to_float(p[i]) : 0.f;
}
template <int N, class E> __device__ __forceinline__ void store_some(E* p, size_t left, const float (&v)[N]) {
  if (left >= N) return store(p, v);
#pragma unroll
  for (int i = 0; i < N; i++)
    if ((size_t)i < left) p[i] = from_float<E>(v[i]);
}

// ---- reductions over a warp and a block; always in the same order, so the same bits each time ----
template <class V> __device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(0xffffffffu, v, m);
  return v;
}
// The sum over all threads, handed to each; `scratch` is shared memory for 32 values, free again afterwards
template <class V> __device__ __forceinline__ V block_sum(V v, V* scratch) {
  int thread = threadIdx.x, warps = blockDim.x / 32;
  v = warp_sum(v);
  if (thread % 32 == 0) scratch[thread / 32] = v;
  __syncthreads();
  v = thread % 32 < warps ? scratch[thread % 32] : V(0);
  __syncthreads();
  return warp_sum(v);
}
__device__ __forceinline__ size_t global_index() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

// ---- activations: by `kind`, numbered as in pointwise_gpu.py; in bf16 with one approximate instruction ----
__device__ __forceinline__ float fast_tanh(float x) {  // absolute error about 2^-11, below bf16's 2^-9
#ifdef __CUDACC__
  float r;
  asm("tanh.approx.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
#else
  return tanhf(x);
#endif
}
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return 0.5f + 0.5f * fast_tanh(0.5f * x);
  return 1 / (1 + expf(-x));
}
enum { NONE, SILU, RELU, GELU, MISH };
__device__ __forceinline__ float activation(float x, int kind) {
  if (kind == NONE) return x;
  if (kind == SILU) return x * sigmoid(x);
  if (kind == RELU) return x < 0 ? 0 : x;
  if (kind == GELU) return 0.5f * x * erfcf(x * -0.70710678f);
  float e = expf(fminf(x, 20)), n = e * (e + 2);  // tanh(log(1 + e)) = n / (n + 2)
  return x * (n / (n + 2));
}
__device__ __forceinline__ float activation_slope(float x, int kind) {
  if (kind == NONE) return 1;
  const float s = sigmoid(x);
  if (kind == SILU) return s * (1 + x * (1 - s));
  if (kind == RELU) return x > 0;
  if (kind == GELU) return 0.5f * erfcf(x * -0.70710678f) + x * 0.39894228f * expf(-0.5f * x * x);
  float e = expf(fminf(x, 20)), n = e * (e + 2), t = n / (n + 2);
  return t + x * s * 4 * (n + 1) / ((n + 2) * (n + 2));  // 1 - t^2 = 4 (n + 1) / (n + 2)^2
}
