// Nearest up-sampling, and the joining and parting of channels: a thread moves VEC channels of a pixel, 16
// bytes. Maths: resample_ref.py. C and D count vectors here.
#include "device_gpu.cuh"
constexpr int N = VEC;

extern "C" __global__ void upsample_forward(const T* x, T* out, int W, int C, uint32_t count) {
  uint32_t i = global_index(), pixel = i / C, row = pixel / W;  // of x
  if (i >= count) return;
  float v[N];
  load(x + (size_t)i * N, v);
  T* to = out + ((size_t)row * 4 * W + 2 * (pixel - row * W)) * C * N + (i - pixel * C) * N;
  const size_t right = (size_t)C * N, below = 2 * W * right;
  store(to, v), store(to + right, v), store(to + below, v), store(to + below + right, v);
}
EXPORT(upsample_forward)

extern "C" __global__ void upsample_backward(const T* dout, T* dx, int W, int C, uint32_t count) {
  uint32_t i = global_index(), pixel = i / C, row = pixel / W;  // of dx, W pixels wide
  if (i >= count) return;
  const T* from = dout + ((size_t)row * 4 * W + 2 * (pixel - row * W)) * C * N + (i - pixel * C) * N;
  const size_t right = (size_t)C * N, below = 2 * W * right;
  float a[N], b[N], c[N], d[N];
  load(from, a), load(from + right, b), load(from + below, c), load(from + below + right, d);
  for (int k = 0; k < N; k++) a[k] = (a[k] + b[k]) + (c[k] + d[k]);
  store(dx + (size_t)i * N, a);
}
EXPORT(upsample_backward)

extern "C" __global__ void concat(const T* a, const T* b, T* out, int C, int D, uint32_t count) {
  uint32_t i = global_index(), pixel = i / (C + D);
  int c = i - pixel * (C + D);
  if (i >= count) return;
  float v[N];
  load(c < C ? a + ((size_t)pixel * C + c) * N : b + ((size_t)pixel * D + c - C) * N, v);
  store(out + (size_t)i * N, v);
}
EXPORT(concat)

extern "C" __global__ void split(const T* x, T* a, T* b, int C, int D, uint32_t count) {
  uint32_t i = global_index(), pixel = i / (C + D);
  int c = i - pixel * (C + D);
  if (i >= count) return;
  float v[N];
  load(x + (size_t)i * N, v);
  store(c < C ? a + ((size_t)pixel * C + c) * N : b + ((size_t)pixel * D + c - C) * N, v);
}
EXPORT(split)
