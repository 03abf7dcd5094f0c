// 4. Tensor cores.
//
// A warp's instruction mma.sync multiplies a 16x16 by a 16x8 tile of bfloat16 into float32 sums: 2048
// multiply-adds, where an FMA of the same warp is 32. The tiles come out of registers, spread over the lanes in
// a pattern of the hardware's; ldmatrix reads them from shared memory in that pattern (mma_gpu.cuh). The block
// is as before, 64 pixels x 64 channels, with 4 warps of 32x32 each and 32 k's at a time, kept as bfloat16: half
// of the shared memory. Rows are padded by 16 bytes, so that the eight rows that ldmatrix reads at once lie in
// different banks.
//
// Prediction. For 16 k's a warp does 8 mma and 4 ldmatrix; the tensor cores could be busy most of the time. But
// all threads load, wait for global memory (some 500 cycles), meet at a barrier, multiply (some 100 cycles),
// meet again. Only other blocks on the same multiprocessor fill the gap. A fifth of the tensor cores: 5 times
// step 3.
//
// What limits it next: waiting.
#include "mma_gpu.cuh"
struct Conv { int B, H, W, C, O; };
constexpr int BM = 64, BN = 64, BK = 32, PITCH_A = BK + 8, PITCH_B = BN + 8;  // C: multiple of BK, O of BN

extern "C" __global__ void __launch_bounds__(128) conv(const bf16* x, const bf16* weight, const float* bias, bf16* out,
                                                       Conv p) {
  DYN_SMEM(memory);  // (BM * PITCH_A + BK * PITCH_B) * 2 bytes
  bf16 *a = (bf16*)memory, *b = a + BM * PITCH_A;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const int pixels = p.B * p.H * p.W, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  float sum[2][4][4] = {};
  for (int tap = 0; tap < 9; tap++)
    for (int c = 0; c < p.C; c += BK) {
      for (int i = tid; i < BM * BK / 8; i += 128) {  // 8 elements, 16 bytes, at a time
        const int row = i / (BK / 8), k = i % (BK / 8) * 8, pixel = m0 + row;
        const int y = pixel / p.W % p.H + tap / 3 - 1, u = pixel % p.W + tap % 3 - 1;
        uint4 v = {0, 0, 0, 0};
        if (pixel < pixels && y >= 0 && y < p.H && u >= 0 && u < p.W)
          v = *(const uint4*)(x + (size_t)(pixel + (tap / 3 - 1) * p.W + tap % 3 - 1) * p.C + c + k);
        *(uint4*)(a + row * PITCH_A + k) = v;
      }
      for (int i = tid; i < BK * BN / 8; i += 128) {
        const int k = i / (BN / 8), n = i % (BN / 8) * 8;
        *(uint4*)(b + k * PITCH_B + n) = *(const uint4*)(weight + (size_t)(tap * p.C + c + k) * p.O + n0 + n);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < BK; k += 16) {
        unsigned am[2][4], bn[2][4];
        const bf16 *row = a + (wm + lane % 16) * PITCH_A + k + lane / 16 * 8, *col = b + (k + lane % 16) * PITCH_B + wn;
        for (int i = 0; i < 2; i++) ldmatrix<false>(am[i], shared_address(row + 16 * i * PITCH_A));
        for (int j = 0; j < 2; j++) ldmatrix<true>(bn[j], shared_address(col + 16 * j + lane / 16 * 8));
        for (int i = 0; i < 2; i++)
          for (int j = 0; j < 4; j++) mma16816(sum[i][j], am[i], bn[j / 2][j % 2 * 2], bn[j / 2][j % 2 * 2 + 1]);
      }
      __syncthreads();
    }
  for (int i = 0; i < 2; i++)
    for (int half = 0; half < 2; half++) {
      const int m = m0 + wm + 16 * i + 8 * half + lane / 4;
      if (m >= pixels) continue;
      for (int j = 0; j < 4; j++) {
        const int n = n0 + wn + 8 * j + lane % 4 * 2;
        const float low = sum[i][j][2 * half] + bias[n], high = sum[i][j][2 * half + 1] + bias[n + 1];
        *(unsigned*)(out + (size_t)m * p.O + n) = pack_bf16(low, high);
      }
    }
}
EXPORT(conv)
