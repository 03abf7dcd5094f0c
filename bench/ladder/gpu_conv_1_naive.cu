// 1. One thread for one output, neighbouring threads on neighbouring pixels.
//
// The seven loops of conv_1_loops.py, of which a GPU runs the outer four at once: 17 million threads for 128
// images of 32x32 and 128 channels. Activations and weights are bfloat16, sums float32, in every step.
//
// What limits it. A warp, 32 threads, executes one load instruction together. Its 32 pixels lie C elements
// apart, so one load of 2 bytes per thread touches 32 different sectors of 32 bytes: 1/16 of what is moved is
// used. The weight is the same for all 32 lanes, which is cheap: one sector. So about 33 sectors pass for 32
// multiply-adds.
//
// Prediction. The L1 cache delivers 4 sectors per cycle to a multiprocessor: 32 multiply-adds every 8 cycles
// where its plain units do 128 in one cycle. 3 % of plain float32, which is itself 1/15 of the tensor cores.
#include "device_gpu.cuh"
struct Conv { int B, H, W, C, O; };

extern "C" __global__ void conv(const bf16* x, const bf16* weight, const float* bias, bf16* out, Conv p) {
  size_t i = global_index(), pixels = (size_t)p.B * p.H * p.W;
  if (i >= pixels * p.O) return;
  int o = i / pixels, pixel = i % pixels, w = pixel % p.W, h = pixel / p.W % p.H;
  float sum = bias[o];
  for (int r = 0; r < 3; r++)
    for (int s = 0; s < 3; s++) {
      int y = h + r - 1, u = w + s - 1;
      if (y < 0 || y >= p.H || u < 0 || u >= p.W) continue;
      const bf16* from = x + (size_t)(pixel + (r - 1) * p.W + s - 1) * p.C;
      for (int c = 0; c < p.C; c++) sum += to_float(from[c]) * to_float(weight[((r * 3 + s) * p.C + c) * p.O + o]);
    }
  out[(size_t)pixel * p.O + o] = from_float<bf16>(sum);
}
EXPORT(conv)
