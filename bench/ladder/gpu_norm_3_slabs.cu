// 3. A block for several groups, 16 bytes to a thread.
//
// A block takes 32 neighbouring channels (here 8 groups of 4, or 1 of 32) of one image: 64 bytes of every pixel,
// two whole sectors. A thread moves 8 channels, 16 bytes, in one instruction; four threads stand side by side on
// a pixel and 64 rows of them go down the image. A thread keeps its sums for each of its 8 channels, and only
// at the end are they added up, by channel and then by group. Sum and sum of squares come from one pass.
//
// Prediction. x is read twice, the second time mostly from the 50 MB L2 cache, and written once: 2 to 3 passes
// over memory, which is what it costs at the least unless the statistics come from the kernel before. 2 to 3
// times step 2.
//
// What nanodiff's own kernel (norm_gpu.cu) adds: sums of x minus the first pixel, so that a large mean costs no
// digits; any number of channels; the backward, which goes over the pixels in the same way.
#include "device_gpu.cuh"
struct Norm { int B, pixels, C, groups; float eps; };
constexpr int WIDE = 32, N = 8, ROWS = 64;  // C: a multiple of WIDE, whole groups in it; 256 threads

extern "C" __global__ void __launch_bounds__(256) groupnorm(const bf16* x, const float* weight, const float* bias,
                                                            bf16* out, Norm p) {
  __shared__ float sums[ROWS][WIDE], squares[ROWS][WIDE], mean[WIDE], rstd[WIDE];
  const int tid = threadIdx.x, c = tid % (WIDE / N) * N, row = tid / (WIDE / N), first = blockIdx.x * WIDE;
  const size_t base = (size_t)blockIdx.y * p.pixels * p.C + first + c;
  float v[N], sum[N] = {}, square[N] = {};
  for (int i = row; i < p.pixels; i += ROWS) {
    load(x + base + (size_t)i * p.C, v);
    for (int k = 0; k < N; k++) sum[k] += v[k], square[k] += v[k] * v[k];
  }
  for (int k = 0; k < N; k++) sums[row][c + k] = sum[k], squares[row][c + k] = square[k];
  __syncthreads();
  if (tid < WIDE)
    for (int r = 1; r < ROWS; r++) sums[0][tid] += sums[r][tid], squares[0][tid] += squares[r][tid];
  __syncthreads();
  if (tid < WIDE) {  // every channel learns what its group has
    const int D = p.C / p.groups, from = tid / D * D;
    float s = 0, q = 0;
    for (int k = from; k < from + D; k++) s += sums[0][k], q += squares[0][k];
    const float n = (float)p.pixels * D, m = s / n;
    mean[tid] = m, rstd[tid] = 1 / sqrtf(fmaxf(q / n - m * m, 0) + p.eps);
  }
  __syncthreads();
  float scale[N], shift[N];
  load(weight + first + c, scale), load(bias + first + c, shift);
  for (int i = row; i < p.pixels; i += ROWS) {
    load(x + base + (size_t)i * p.C, v);
    for (int k = 0; k < N; k++) {
      const float y = (v[k] - mean[c + k]) * rstd[c + k] * scale[k] + shift[k];
      v[k] = y * sigmoid(y);
    }
    store(out + base + (size_t)i * p.C, v);
  }
}
EXPORT(groupnorm)
