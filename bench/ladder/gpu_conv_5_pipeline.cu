// 5. Copies that run ahead, bigger tiles.
//
// cp.async moves 16 bytes from global to shared memory in the background. Shared memory holds three stages, each
// with 64 k's: while one is multiplied, two are on their way, and one barrier for each stage is enough. The tile
// grows to 128x128, a warp's share to 64x64: for 16 k's, 8 ldmatrix now feed 32 mma (before: 4 for 8), and every
// element of global memory is used 128 times. 64 k's of a row are 128 bytes, all 32 banks, so padding gives way to
// a swizzle: chunk c of row r lies at place c ^ (r % 8) (mma_gpu.cuh), which loses no memory and keeps
// eight rows, or eight chunks of a row, in different banks.
//
// Prediction. The ceiling of mma.sync, which is the peak itself up to Ada, but 63 % of it on Hopper, whose tensor
// cores want wgmma. Of that ceiling 60 to 80 %, three times step 4: the rest goes to the arithmetic of
// addresses and to the last, not quite full wave of blocks.
//
// What nanodiff's own kernel (gemm_gpu.cu) adds: tiles chosen for each shape, any C and O, all convolutions and
// their gradients from one source, a fused epilogue, and on Hopper wgmma.
#include "mma_gpu.cuh"
struct Conv { int B, H, W, C, O; };
constexpr int BM = 128, BN = 128, BK = 64, STAGES = 3;  // C: a multiple of BK, O of BN

extern "C" __global__ void __launch_bounds__(128) conv(const bf16* x, const bf16* weight, const float* bias, bf16* out,
                                                       Conv p) {
  DYN_SMEM(memory);  // STAGES * (BM + BN) * BK * 2 bytes
  const unsigned a = shared_address(memory), b = a + STAGES * BM * BK * 2;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, wm = warp / 2 * 64, wn = warp % 2 * 64;
  const int pixels = p.B * p.H * p.W, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN, steps = 9 * p.C / BK;
  auto fetch = [&](int step, int slot) {
    const int tap = step * BK / p.C, c = step * BK % p.C, dy = tap / 3 - 1, dx = tap % 3 - 1;
#pragma unroll
    for (int i = tid; i < BM * BK / 8; i += 128) {
      const int row = i / 8, pixel = m0 + row, y = pixel / p.W % p.H + dy, u = pixel % p.W + dx;
      const bool ok = pixel < pixels && y >= 0 && y < p.H && u >= 0 && u < p.W;
      const bf16* from = ok ? x + (size_t)(pixel + dy * p.W + dx) * p.C + c + i % 8 * 8 : x;
      cp_async16(a + slot * BM * BK * 2 + place<BM>(row, i % 8), from, ok);
    }
#pragma unroll
    for (int i = tid; i < BK * BN / 8; i += 128) {
      const bf16* from = weight + (size_t)(step * BK + i / 16) * p.O + n0 + i % 16 * 8;
      cp_async16(b + slot * BK * BN * 2 + place<BK>(i / 16, i % 16), from, true);
    }
  };
  float sum[4][8][4] = {};
  for (int step = 0; step < STAGES - 1; step++) {
    fetch(step, step);
    cp_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_wait<STAGES - 2>();  // this step's copies have landed
    __syncthreads();        // everybody's have, and everybody is done with the slot that is filled next
    if (step + STAGES - 1 < steps) fetch(step + STAGES - 1, (step + STAGES - 1) % STAGES);
    cp_commit();
    const unsigned as = a + step % STAGES * BM * BK * 2, bs = b + step % STAGES * BK * BN * 2;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
      unsigned am[4][4], bn[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) ldmatrix<false>(am[i], as + place<BM>(wm + 16 * i + lane % 16, k / 8 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; j++) ldmatrix<true>(bn[j], bs + place<BK>(k + lane % 16, wn / 8 + 2 * j + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) mma16816(sum[i][j], am[i], bn[j / 2][j % 2 * 2], bn[j / 2][j % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    for (int half = 0; half < 2; half++) {
      const int m = m0 + wm + 16 * i + 8 * half + lane / 4;
      if (m >= pixels) continue;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int n = n0 + wn + 8 * j + lane % 4 * 2;
        const float low = sum[i][j][2 * half] + bias[n], high = sum[i][j][2 * half + 1] + bias[n + 1];
        *(unsigned*)(out + (size_t)m * p.O + n) = pack_bf16(low, high);
      }
    }
}
EXPORT(conv)
