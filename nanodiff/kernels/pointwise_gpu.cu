// Ops on one element at a time, and the loss. Maths: pointwise_ref.py.
#include "random_gpu.cuh"
constexpr int N = 16 / sizeof(T);  // elements that a thread takes of an activation

// out = f(a, b), element by element; the results come first among a kernel's arguments
template <class F> __device__ __forceinline__ void each(T* out, const T* a, const T* b, size_t n, F f) {
  const size_t i = global_index() * N;
  if (i >= n) return;
  float x[N], y[N];
  load_some(a + i, n - i, x), load_some(b + i, n - i, y);
#pragma unroll
  for (int k = 0; k < N; k++) x[k] = f(x[k], y[k]);
  store_some(out + i, n - i, x);
}
extern "C" __global__ void add(T* out, const T* a, const T* b, size_t n) {
  each(out, a, b, n, [](float x, float y) { return x + y; });
}
EXPORT(add)
extern "C" __global__ void affine(T* out, const T* x, float a, float b, size_t n) {
  each(out, x, x, n, [=](float x, float) { return x * a + b; });
}
EXPORT(affine)
extern "C" __global__ void activation_forward(T* out, const T* x, int kind, size_t n) {
  each(out, x, x, n, [=](float x, float) { return activation(x, kind); });
}
EXPORT(activation_forward)
extern "C" __global__ void activation_backward(T* dx, const T* dout, const T* x, int kind, size_t n) {
  each(dx, dout, x, n, [=](float d, float x) { return d * activation_slope(x, kind); });
}
EXPORT(activation_backward)

#ifndef FROM
#define FROM float
#define TO T
#endif
extern "C" __global__ void cast(TO* out, const FROM* x, size_t n) {  // between float, double and bf16
  const size_t i = global_index();
  if (i < n) out[i] = from_float<TO>(to_float(x[i]));
}
EXPORT(cast)

extern "C" __global__ void dropout(T* out, const T* x, uint32_t samples, uint32_t size, uint64_t seed,
                                   const uint32_t* step_at, uint32_t step, uint32_t purpose,
                                   uint32_t threshold, float scale) {
  const Draw d(size, seed, step_at, step, purpose, 0);
  if (d.sample >= samples) return;
  const bool aligned = size % 4 == 0;
  float v[4];
  if (aligned) load(x + d.at, v);
  else for (uint32_t k = 0; k < 4; k++) v[k] = k < d.left ? to_float(x[d.at + k]) : 0;
  for (int k = 0; k < 4; k++) v[k] = d.word[k] >= threshold ? v[k] * scale : 0;
  if (aligned) return store(out + d.at, v);
  for (uint32_t k = 0; k < 4; k++)
    if (k < d.left) out[d.at + k] = from_float<T>(v[k]);
}
EXPORT(dropout)

enum { EPS, X0, V };  // predictions; samples have `size` elements
extern "C" __global__ void q_sample(T* xt, T* target, const T* x0, const T* eps, const float* a,
                                    const float* s, int kind, uint32_t size, size_t n) {
  const size_t i = global_index();
  if (i >= n) return;
  const float x = to_float(x0[i]), e = to_float(eps[i]), signal = a[i / size], noise = s[i / size];
  xt[i] = from_float<T>(signal * x + noise * e);
  target[i] = from_float<T>(kind == EPS ? e : kind == X0 ? x : signal * e - noise * x);
}
EXPORT(q_sample)

// a block to `chunk` elements; update_gpu.cu adds up the parts. weight: of each sample of `size` elements
extern "C" __global__ void mse_loss(T* dpred, double* parts, const T* pred, const T* target,
                                    const float* weight, uint32_t size, size_t n, int chunk, float scale) {
  __shared__ double scratch[32];
  const size_t begin = (size_t)blockIdx.x * chunk, end = min(n, begin + chunk);
  double sum = 0;
  for (size_t i = begin + N * threadIdx.x; i < end; i += N * blockDim.x) {
    float d[N], y[N];
    load_some(pred + i, n - i, d), load_some(target + i, n - i, y);
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float w = weight && i + k < n ? weight[(i + k) / size] : 1;
      d[k] -= y[k];
      sum += w * ((double)d[k] * d[k]);
      d[k] *= w * scale;
    }
    store_some(dpred + i, n - i, d);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
EXPORT(mse_loss)

extern "C" __global__ void sample_step(float* next, float* x0, const float* x, const float* pred,
                                       const float* z, const float* c, float limit, size_t n) {
  const size_t i = global_index();
  if (i >= n) return;
  float v = plus(mul(c[0], x[i]), mul(c[1], pred[i]));  // each rounded on its own, as NumPy has it
  if (limit > 0) v = v > limit ? limit : v < -limit ? -limit : v;  // NaN stays
  x0[i] = v;
  next[i] = plus(plus(mul(c[2], v), mul(c[3], x[i])), mul(c[4], z[i]));
}
EXPORT(sample_step)

// ---- one number for each sample, of whatever type the caller has: 0 float, 1 double, 2 int32, 3 int64 ----
__device__ __forceinline__ double number(const void* a, int type, size_t i) {
  if (type == 0) return ((const float*)a)[i];
  if (type == 1) return ((const double*)a)[i];
  return type == 2 ? ((const int*)a)[i] : (double)((const long long*)a)[i];
}

// frequency i is exp(rate * i); angles are float64, counted in half turns
extern "C" __global__ void time_embedding(T* out, const void* t, int type, int dim, double rate,
                                          int cos_first, size_t n) {
  const int half = dim / 2, b = global_index() / dim, place = global_index() % dim, i = place % half;
  if (global_index() >= n) return;
  const double angle = number(t, type, b) * exp(rate * i) * 0.31830988618379067;
  const float wave = (place < half) == (cos_first != 0) ? cospi(angle) : sinpi(angle);
  out[global_index()] = from_float<T>(place < 2 * half ? wave : 0);
}
EXPORT(time_embedding)

extern "C" __global__ void embedding_forward(float* out, const void* labels, int type, const float* table,
                                             int D, size_t n) {
  const size_t i = global_index();
  if (i < n) out[i] = table[(size_t)number(labels, type, i / D) * D + i % D];
}
EXPORT(embedding_forward)

// a thread to each element of dtable, which adds up its samples in their order
extern "C" __global__ void embedding_backward(float* dtable, const float* dout, const void* labels, int type,
                                              int B, int D, size_t n) {
  const size_t i = global_index();
  if (i >= n) return;
  float sum = dtable[i];
  for (int b = 0; b < B; b++)
    if ((size_t)number(labels, type, b) == i / D) sum += dout[(size_t)b * D + i % D];
  dtable[i] = sum;
}
EXPORT(embedding_backward)

extern "C" __global__ void gather_images(float* out, const uint8_t* images, const void* chosen, int type,
                                         const uint8_t* mirrored, uint32_t W, uint32_t C, uint32_t size,
                                         size_t n) {  // images of `size` bytes
  if (global_index() >= n) return;
  const uint32_t b = global_index() / size, i = global_index() % size, x = i / C % W;
  const uint32_t from = mirrored[b] ? i + (W - 1 - 2 * x) * C : i;  // W - 1 - x instead of x
  const uint8_t v = images[(size_t)number(chosen, type, b) * size + from];
  out[global_index()] = plus(__fdiv_rn(v, 127.5f), -1.f);
}
EXPORT(gather_images)
