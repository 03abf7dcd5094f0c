// The optimiser's passes over the flat buffers. Maths: update_ref.py. Sums are in two stages, each in a fixed
// order: every block adds up a chunk, then one block adds up the blocks.
#include "device_gpu.cuh"

extern "C" __global__ void zero_grad(float* buffer, size_t n) {
  const size_t i = global_index() * 4;
  const float zero[4] = {};
  if (i < n) store_some(buffer + i, n - i, zero);
}
EXPORT(zero_grad)

extern "C" __global__ void squared_norm(const float* grad, double* parts, size_t n, int chunk) {
  __shared__ double scratch[32];
  const size_t begin = (size_t)blockIdx.x * chunk, end = min(n, begin + chunk);
  double sum = 0;
#pragma unroll 4
  for (size_t i = begin + 4 * threadIdx.x; i < end; i += 4 * blockDim.x) {
    float v[4];
    load_some(grad + i, n - i, v);
    sum += v[0] * v[0] + v[1] * v[1] + (v[2] * v[2] + v[3] * v[3]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
EXPORT(squared_norm)

extern "C" __global__ void total(const double* parts, double* out, int count, double divisor) {
  __shared__ double scratch[32];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) out[0] = sum / divisor;
}
EXPORT(total)

// What adam_update needs of state and lr, worked out once, in float64: numbers[5], and the steps are counted.
// The first number is 0 where the step is to be skipped.
extern "C" __global__ void adam_numbers(double* state, float* numbers, const double* lr_at, double lr,
                                        double beta1, double beta2, double clip, double ema_decay) {
  if (threadIdx.x) return;
  const bool finite = fabs(state[0]) <= 1.7976931348623157e308 && fabs(state[1]) <= 1.7976931348623157e308;
  const double n = state[2];
  state[finite ? 2 : 3] += 1;
  const double scale = clip > 0 ? clip / (sqrt(state[1]) + 1e-6) : 1, warm = (1 + n) / (10 + n);
  numbers[0] = finite;
  numbers[1] = (float)(scale < 1 ? scale : 1);
  numbers[2] = (float)((lr_at ? *lr_at : lr) / (1 - pow(beta1, n + 1)));
  numbers[3] = (float)(1 / sqrt(1 - pow(beta2, n + 1)));
  numbers[4] = (float)(1 - (ema_decay < warm ? ema_decay : warm));
}
EXPORT(adam_numbers)

extern "C" __global__ void adam_update(float* weights, const float* grad, float* m, float* v, float* ema,
                                       const float* numbers, float b1, float b2, float eps, size_t n) {
  const size_t i = global_index() * 4;
  if (i >= n || numbers[0] == 0) return;
  const float scale = numbers[1], step_size = numbers[2], root = numbers[3], keep = numbers[4];
  float w[4], g[4], first[4], second[4], average[4];
  load_some(weights + i, n - i, w), load_some(grad + i, n - i, g);
  load_some(m + i, n - i, first), load_some(v + i, n - i, second);
  if (ema) load_some(ema + i, n - i, average);
#pragma unroll
  for (int k = 0; k < 4; k++) {
    g[k] *= scale;
    first[k] += b1 * (g[k] - first[k]);
    second[k] += b2 * (g[k] * g[k] - second[k]);
    w[k] -= step_size * first[k] / (sqrtf(second[k]) * root + eps);
    if (ema) average[k] += keep * (w[k] - average[k]);
  }
  store_some(weights + i, n - i, w), store_some(m + i, n - i, first), store_some(v + i, n - i, second);
  if (ema) store_some(ema + i, n - i, average);
}
EXPORT(adam_update)

extern "C" __global__ void prepare_weights(const float* flat, bf16* shadow, size_t n) {
  const size_t i = global_index() * 8;
  if (i >= n) return;
  float v[8];
  load_some(flat + i, n - i, v), store_some(shadow + i, n - i, v);
}
EXPORT(prepare_weights)
