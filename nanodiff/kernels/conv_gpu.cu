// Sums that the backward of convolutions and linear layers needs beside its matrix products (gemm_gpu.cu).
// Their order is fixed: no atomics.
#include "device_gpu.cuh"
constexpr int THREADS = 256;

// sums[g][o] = sum of x[r][o] over the rows r of group g, `depth` rows in a group. A block takes one group
// and `wide` * STEP columns; its threads lie `wide` in a row, and every so many rows of x go to one of them.
extern "C" __global__ void __launch_bounds__(THREADS) column_sums(
    const T* __restrict__ x, float* __restrict__ sums, int rows, int depth, int O, int wide) {
  __shared__ float s[THREADS][STEP + 1];
  const int tid = threadIdx.x, col = (blockIdx.y * wide + tid % wide) * STEP, groups = THREADS / wide;
  const int first = blockIdx.x * depth, last = min(first + depth, rows);
  float sum[STEP] = {}, v[STEP];
  if (col < O) {
    #pragma unroll 4
    for (int r = first + tid / wide; r < last; r += groups) {
      load(x + (size_t)r * O + col, v);
      for (int i = 0; i < STEP; i++) sum[i] += v[i];
    }
  }
  for (int i = 0; i < STEP; i++) s[tid][i] = sum[i];
  for (int half = groups / 2; half; half /= 2) {
    __syncthreads();
    if (tid < half * wide)
      for (int i = 0; i < STEP; i++) s[tid][i] += s[tid + half * wide][i];
  }
  if (tid < wide && col < O) {
    for (int i = 0; i < STEP; i++) sum[i] = s[tid][i];
    store(sums + (size_t)blockIdx.x * O + col, sum);
  }
}
EXPORT(column_sums)

// into[i] += sum over r of parts[r][i], for two such sums at once: the first `blocks` blocks make the first.
extern "C" __global__ void __launch_bounds__(THREADS) add_parts(
    const float* __restrict__ parts, float* __restrict__ into, int count, int n, int blocks,
    const float* __restrict__ parts2, float* __restrict__ into2, int count2, int n2) {
  __shared__ float s[8][32];
  const bool second = blockIdx.x >= (unsigned)blocks;
  const int column = threadIdx.x % 32, row = threadIdx.x / 32;
  const int i = (blockIdx.x - (second ? blocks : 0)) * 32 + column;
  if (second) parts = parts2, into = into2, count = count2, n = n2;
  float sum = 0;
  if (i < n) {
    #pragma unroll 4
    for (int r = row; r < count; r += 8) sum += parts[(size_t)r * n + i];
  }
  s[row][column] = sum;
  __syncthreads();
  if (row == 0 && i < n) {
    for (int r = 1; r < 8; r++) sum += s[r][column];
    into[i] += sum;
  }
}
EXPORT(add_parts)
