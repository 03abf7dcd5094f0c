// Words and normals of any shape. Maths: random_ref.py.
#include "random_gpu.cuh"

extern "C" __global__ void draw(uint32_t* out, uint32_t samples, uint32_t size, uint64_t seed,
                                const uint32_t* step_at, uint32_t step, uint32_t purpose, uint32_t first,
                                int normals) {
  Draw d(size, seed, step_at, step, purpose, first);
  if (d.sample >= samples) return;
  if (normals) box_muller(d.word[0], d.word[1]), box_muller(d.word[2], d.word[3]);
  for (uint32_t k = 0; k < 4; k++)
    if (k < d.left) out[d.at + k] = d.word[k];
}
EXPORT(draw)
