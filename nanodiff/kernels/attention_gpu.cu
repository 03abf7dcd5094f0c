// The softmax of attention, and what its backward subtracts. Maths: attention_ref.py. A warp makes a row.
#include "device_gpu.cuh"
constexpr int WARPS = 8;  // of a block, each with a row of its own

// p[r] = softmax(scale * scores[r]) and lse[r] = log sum exp(scale * scores[r]) for rows of n
extern "C" __global__ void __launch_bounds__(32 * WARPS) softmax(
    const float* __restrict__ scores, T* __restrict__ p, float* __restrict__ lse, int n, float scale,
    int rows) {
  const int lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32;
  if (r >= rows) return;
  const float* s = scores + (size_t)r * n;
  float top = s[0], sum = 0;
  for (int i = lane; i < n; i += 32) top = fmaxf(top, s[i]);
  for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, m));
  for (int i = lane; i < n; i += 32) sum += expf(scale * (s[i] - top));
  const float l = scale * top + logf(warp_sum(sum));
  for (int i = lane; i < n; i += 32) p[(size_t)r * n + i] = from_float<T>(expf(scale * s[i] - l));
  if (lane == 0) lse[r] = l;
}
EXPORT(softmax)

// delta[b][h][n] = sum over head h's D columns of dout[b][n] * out[b][n]
extern "C" __global__ void __launch_bounds__(32 * WARPS) row_products(
    const T* __restrict__ dout, const T* __restrict__ out, float* __restrict__ delta, int N, int heads,
    int D, int rows) {
  const int lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32;
  if (r >= rows) return;
  const int h = r / N % heads;
  const size_t at = ((size_t)(r / N / heads * N + r % N) * heads + h) * D;
  float sum = 0;
  for (int i = lane; i < D; i += 32) sum += to_float(dout[at + i]) * to_float(out[at + i]);
  sum = warp_sum(sum);
  if (lane == 0) delta[r] = sum;
}
EXPORT(row_products)
