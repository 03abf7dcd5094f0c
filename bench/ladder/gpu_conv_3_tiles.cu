// 3. A tile in shared memory, a small tile in registers.
//
// The convolution as a matrix product: rows are pixels, columns are output channels, and the sum runs over
// k = (tap, input channel). Nobody makes the matrix of windows (nine times the size of x): row and k say where
// its element lies in x, which is called an implicit GEMM. A block of 256 threads makes 64 pixels x 64
// channels. For 16 k's at a time it puts 64 x 16 of x and 16 x 64 of the weights into shared memory, each
// loaded once and read by 16 threads. A thread sums 4 x 4 outputs in registers: 8 values from shared memory
// for 16 multiply-adds.
//
// Prediction. Global memory is hardly felt any more: 64-fold reuse. Shared memory gives 32 floats in a cycle
// to a multiprocessor that could do 128 multiply-adds; as float4 a thread's 8 values are 2 loads, and x's are
// a broadcast. So half of plain float32 or more, 10 times step 2 -- and the end of this road: tensor cores
// are 15 times as fast as the units used here.
#include "device_gpu.cuh"
struct Conv { int B, H, W, C, O; };
constexpr int M = 64, N = 64, K = 16;  // C must be divisible by K, O by N

extern "C" __global__ void __launch_bounds__(256) conv(const bf16* x, const bf16* weight, const float* bias, bf16* out,
                                                       Conv p) {
  __align__(16) __shared__ float a[K][M + 4], b[K][N];  // a lies transposed; + 4: writes meet fewer banks
  const int tid = threadIdx.x, pixels = p.B * p.H * p.W, m0 = blockIdx.x * M, n0 = blockIdx.y * N;
  const int row = tid / 4, k4 = tid % 4 * 4;  // of a: this thread loads 4 channels of one pixel
  const int pixel = m0 + row, w = pixel % p.W, h = pixel / p.W % p.H;
  const int tm = tid / 16 * 4, tn = tid % 16 * 4;  // its 4 x 4 outputs
  float sum[4][4] = {};
  for (int tap = 0; tap < 9; tap++) {
    const int y = h + tap / 3 - 1, u = w + tap % 3 - 1;
    const bool inside = pixel < pixels && y >= 0 && y < p.H && u >= 0 && u < p.W;
    const bf16* from = x + (size_t)(pixel + (tap / 3 - 1) * p.W + tap % 3 - 1) * p.C;
    for (int c = 0; c < p.C; c += K) {
      float v[4] = {};
      if (inside) load(from + c + k4, v);
      for (int i = 0; i < 4; i++) a[k4 + i][row] = v[i];
      load(weight + (size_t)(tap * p.C + c + tid / 16) * p.O + n0 + tid % 16 * 4, v);
      store(&b[tid / 16][tid % 16 * 4], v);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; k++) {
        float am[4], bn[4];
        load(&a[k][tm], am), load(&b[k][tn], bn);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) sum[i][j] += am[i] * bn[j];
      }
      __syncthreads();
    }
  }
  float add[4];
  load(bias + n0 + tn, add);
  for (int i = 0; i < 4; i++) {
    if (m0 + tm + i >= pixels) break;
    for (int j = 0; j < 4; j++) sum[i][j] += add[j];
    store(out + (size_t)(m0 + tm + i) * p.O + n0 + tn, sum[i]);
  }
}
EXPORT(conv)
