// 2. Neighbouring threads on neighbouring channels.
//
// The same loops; the thread's number is split the other way round. Now the 32 lanes of a warp share a pixel:
// its element of x is one address for all (a broadcast), and their 32 weights are 64 neighbouring bytes, two
// sectors. 3 sectors for 32 multiply-adds instead of 33, and the output is written in whole sectors too.
//
// Prediction. Two load instructions for one multiply-add: the load units take one warp instruction in a cycle
// or two and the adders four, so at best 1/8 to 1/4 of plain float32; the conversions cost as much again.
// About 5 times step 1.
//
// What limits it next: nothing that was loaded is used twice by the thread that loaded it.
#include "device_gpu.cuh"
struct Conv { int B, H, W, C, O; };

extern "C" __global__ void conv(const bf16* x, const bf16* weight, const float* bias, bf16* out, Conv p) {
  size_t i = global_index(), pixels = (size_t)p.B * p.H * p.W;
  if (i >= pixels * p.O) return;
  int o = i % p.O, pixel = i / p.O, w = pixel % p.W, h = pixel / p.W % p.H;
  float sum = bias[o];
  for (int r = 0; r < 3; r++)
    for (int s = 0; s < 3; s++) {
      int y = h + r - 1, u = w + s - 1;
      if (y < 0 || y >= p.H || u < 0 || u >= p.W) continue;
      const bf16* from = x + (size_t)(pixel + (r - 1) * p.W + s - 1) * p.C;
      for (int c = 0; c < p.C; c++) sum += to_float(from[c]) * to_float(weight[((r * 3 + s) * p.C + c) * p.O + o]);
    }
  out[i] = from_float<bf16>(sum);
}
EXPORT(conv)
