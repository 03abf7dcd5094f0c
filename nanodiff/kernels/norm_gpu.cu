// Group norm with or without SiLU, and the modulation of channels. Maths: norm_ref.py, pointwise_ref.py.
//
// A block owns a slab of neighbouring channels, whole groups of them, of one image: blockIdx is (slab, image,
// part of the pixels). It goes over its pixels twice, and what the first pass read is still in the L2 cache
// at the second: DRAM sees x once. A row of `columns` threads takes one pixel at a time, VEC channels to a
// thread, and the `rows` of threads take pixels in turn; sums are over each row's pixels first, then over
// rows, so their order depends on the size of an image alone. Outputs are __restrict__, so that the loads of
// the next pixels are under way before a pixel is stored.
#include "device_gpu.cuh"
constexpr int N = VEC;  // and KIND is the activation: NONE, SILU, ...; a block has at most 256 threads
struct Slab { int pixels, C, D, width, rows, columns, chunk; };  // D channels to a group; pixels of a part

struct Place {  // what is this block's, and this thread's, of a Slab
  int channel, width, group, groups;  // first channel, how many; first group of all images' groups, how many
  int row, column, count, step;       // of this thread; how many pixels it takes, and how far apart in memory
  size_t base, first;                 // where the slab is in memory, and this thread's first pixel
  __device__ Place(const Slab& p) {
    channel = blockIdx.x * p.width, width = min(p.width, p.C - channel);
    group = (blockIdx.y * p.C + channel) / p.D, groups = width / p.D;
    row = threadIdx.x / p.columns, column = threadIdx.x % p.columns * N;
    const int begin = blockIdx.z * p.chunk + row, end = min(p.pixels, (int)(blockIdx.z + 1) * p.chunk);
    count = row < p.rows && begin < end ? (end - begin + p.rows - 1) / p.rows : 0;
    base = (size_t)blockIdx.y * p.pixels * p.C + channel;
    first = base + (size_t)begin * p.C, step = p.rows * p.C;
  }
};

struct Channels {  // of N channels: y = (x - mean) * scale + shift; subtract first, or digits are lost
  float mean[N], scale[N], shift[N];
  __device__ Channels(const float* means, const float* rstd, const float* weight, const float* bias,
                      const Slab& p, const Place& at, int c) {
    load(weight + at.channel + c, scale), load(bias + at.channel + c, shift);
    int g = at.group + c / p.D, place = c % p.D;
#pragma unroll
    for (int k = 0; k < N; k++) {
      mean[k] = means[g], scale[k] *= rstd[g];
      if (++place == p.D) place = 0, g++;
    }
  }
  __device__ Channels(const float* emb, const Slab& p, const Place& at, int c) {  // [image][scale | shift]
    emb += (size_t)blockIdx.y * 2 * p.C + at.channel + c;
    load(emb, scale), load(emb + p.C, shift);
#pragma unroll
    for (int k = 0; k < N; k++) mean[k] = 0, scale[k] += 1;
  }
};

// a and b, sums of each row of threads and channel, become sums of each channel (in the place of row 0)
__device__ __forceinline__ void add_rows(float* a, float* b, const Slab& p, int width) {
  __syncthreads();
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    float s = 0, q = 0;
    for (int r = 0; r < p.rows; r++) s += a[r * p.width + c], q += b[r * p.width + c];
    a[c] = s, b[c] = q;
  }
  __syncthreads();
}

// out = act(y);  channels: c -> Channels
template <class F>
__device__ __forceinline__ void apply(const T* x, T* out, const Slab& p, const Place& at, F channels) {
  for (int c = at.column; c < at.width; c += p.columns * N) {
    const Channels to = channels(c);
#pragma unroll 4
    for (int i = 0; i < at.count; i++) {
      const size_t here = at.first + (size_t)i * at.step + c;
      float v[N];
      load(x + here, v);
#pragma unroll
      for (int k = 0; k < N; k++) v[k] = activation((v[k] - to.mean[k]) * to.scale[k] + to.shift[k], KIND);
      store(out + here, v);
    }
  }
}

// d = x - mean and dy = dout * act'(y) of the N channels of a pixel at `here`
__device__ __forceinline__ void slopes(const T* dout, const T* x, size_t here, const Channels& to,
                                       float (&d)[N], float (&dy)[N]) {
  load(x + here, d), load(dout + here, dy);
#pragma unroll
  for (int k = 0; k < N; k++) {
    d[k] -= to.mean[k];
    dy[k] *= activation_slope(d[k] * to.scale[k] + to.shift[k], KIND);
  }
}

extern "C" __global__ void __launch_bounds__(256, 3)
groupnorm_forward(const T* __restrict__ x, const float* weight, const float* bias, T* __restrict__ out,
                  float* mean, float* rstd, Slab p, float eps) {
  DYN_SMEM(memory);
  float *sum = (float*)memory, *square = sum + p.rows * p.width;
  const Place at(p);
  const T* from = x + at.base;
  if (at.row < p.rows)
    for (int c = at.column; c < at.width; c += p.columns * N) {
      float first[N], s[N] = {}, q[N] = {};  // sums of x - first: a large mean costs no digits
      load(from + c, first);
#pragma unroll 4
      for (int i = 0; i < at.count; i++) {
        float v[N];
        load(x + at.first + (size_t)i * at.step + c, v);
#pragma unroll
        for (int k = 0; k < N; k++) v[k] -= first[k], s[k] += v[k], q[k] += v[k] * v[k];
      }
      store(sum + at.row * p.width + c, s), store(square + at.row * p.width + c, q);
    }
  add_rows(sum, square, p, at.width);
  const double pixels = p.pixels, n = pixels * p.D;
  for (int g = threadIdx.x / 32; g < at.groups; g += blockDim.x / 32) {  // a warp to a group
    const int begin = g * p.D + threadIdx.x % 32, end = (g + 1) * p.D;
    double total = 0, spread = 0;
    for (int c = begin; c < end; c += 32) total += sum[c] + pixels * to_float(from[c]);
    const double m = warp_sum(total) / n;
    for (int c = begin; c < end; c += 32) {
      const double shift = m - to_float(from[c]);  // sum (x - m)^2 from the sums of x - first
      spread += square[c] - 2 * shift * sum[c] + pixels * shift * shift;
    }
    spread = warp_sum(spread) / n;
    if (threadIdx.x % 32) continue;
    mean[at.group + g] = (float)m;
    rstd[at.group + g] = (float)(1 / sqrt((spread < 0 ? 0 : spread) + eps));
  }
  __syncthreads();
  apply(x, out, p, at, [&](int c) { return Channels(mean, rstd, weight, bias, p, at, c); });
}
EXPORT(groupnorm_forward)

extern "C" __global__ void groupnorm_again(const T* __restrict__ x, const float* mean, const float* rstd,
                                           const float* weight, const float* bias, T* __restrict__ out,
                                           Slab p) {
  const Place at(p);
  apply(x, out, p, at, [&](int c) { return Channels(mean, rstd, weight, bias, p, at, c); });
}
EXPORT(groupnorm_again)

// shares [image][2][C]: what each image adds to dweight and dbias
extern "C" __global__ void __launch_bounds__(256, 2)
groupnorm_backward(const T* __restrict__ dout, const T* __restrict__ x, const float* mean, const float* rstd,
                   const float* weight, const float* bias, const T* __restrict__ residual, T* __restrict__ dx,
                   float* shares, Slab p) {
  DYN_SMEM(memory);
  float *sum = (float*)memory, *product = sum + p.rows * p.width;  // of dy, and of dy (x - mean)
  float* moment = product + p.rows * p.width;                     // two for each group
  const Place at(p);
  if (at.row < p.rows)
    for (int c = at.column; c < at.width; c += p.columns * N) {
      const Channels to(mean, rstd, weight, bias, p, at, c);
      float s[N] = {}, q[N] = {};
#pragma unroll 2
      for (int i = 0; i < at.count; i++) {
        float d[N], dy[N];
        slopes(dout, x, at.first + (size_t)i * at.step + c, to, d, dy);
#pragma unroll
        for (int k = 0; k < N; k++) s[k] += dy[k], q[k] += dy[k] * d[k];
      }
      store(sum + at.row * p.width + c, s), store(product + at.row * p.width + c, q);
    }
  add_rows(sum, product, p, at.width);
  for (int g = threadIdx.x / 32; g < at.groups; g += blockDim.x / 32) {
    const float r = rstd[at.group + g], n = (float)p.pixels * p.D;
    float total = 0, total_norm = 0;
    for (int c = g * p.D + threadIdx.x % 32; c < (g + 1) * p.D; c += 32) {
      float* share = shares + (size_t)blockIdx.y * 2 * p.C + at.channel + c;
      const float w = weight[at.channel + c], dnorm = product[c] * r;
      share[0] = dnorm, share[p.C] = sum[c];
      total += w * sum[c], total_norm += w * dnorm;
    }
    total = warp_sum(total), total_norm = warp_sum(total_norm);
    if (threadIdx.x % 32 == 0) moment[2 * g] = -r * total / n, moment[2 * g + 1] = -r * r * total_norm / n;
  }
  __syncthreads();
  // dx = rstd (dnorm - average - norm average_norm) = dy scale + (x - mean) moment[1] + moment[0]
  for (int c = at.column; c < at.width; c += p.columns * N) {
    const Channels to(mean, rstd, weight, bias, p, at, c);
    float first[N], second[N];
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float* both = moment + 2 * ((c + k) / p.D);
      first[k] = both[0], second[k] = both[1];
    }
#pragma unroll 2
    for (int i = 0; i < at.count; i++) {
      const size_t here = at.first + (size_t)i * at.step + c;
      float d[N], dy[N], more[N] = {};
      slopes(dout, x, here, to, d, dy);
      if (residual) load(residual + here, more);
#pragma unroll
      for (int k = 0; k < N; k++) dy[k] = dy[k] * to.scale[k] + d[k] * second[k] + first[k] + more[k];
      store(dx + here, dy);
    }
  }
}
EXPORT(groupnorm_backward)

// dweight and dbias += the shares of all images: 32 columns to a block, its 8 warps take images in turn
extern "C" __global__ void add_shares(const float* shares, float* dweight, float* dbias, int B, int C) {
  __shared__ float part[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
  float s = 0;
#pragma unroll 4
  for (int b = warp; b < B; b += 8) s += c < 2 * C ? shares[(size_t)b * 2 * C + c] : 0;
  part[warp][lane] = s;
  __syncthreads();
  if (warp || c >= 2 * C) return;
  for (int w = 1; w < 8; w++) s += part[w][lane];
  float* into = c < C ? dweight + c : dbias + (c - C);
  *into += s;
}
EXPORT(add_shares)

extern "C" __global__ void modulate_forward(const T* __restrict__ x, const float* emb, T* __restrict__ out,
                                            Slab p) {
  const Place at(p);
  apply(x, out, p, at, [&](int c) { return Channels(emb, p, at, c); });
}
EXPORT(modulate_forward)

extern "C" __global__ void modulate_backward(const T* __restrict__ dout, const T* __restrict__ x,
                                             const float* emb, T* __restrict__ dx, float* demb, Slab p) {
  DYN_SMEM(memory);
  float *sum = (float*)memory, *product = sum + p.rows * p.width;  // of dy, and of dy x
  const Place at(p);
  if (at.row < p.rows)
    for (int c = at.column; c < at.width; c += p.columns * N) {
      const Channels to(emb, p, at, c);
      float s[N] = {}, q[N] = {};
      for (int i = 0; i < at.count; i++) {
        const size_t here = at.first + (size_t)i * at.step + c;
        float d[N], dy[N];
        slopes(dout, x, here, to, d, dy);
#pragma unroll
        for (int k = 0; k < N; k++) s[k] += dy[k], q[k] += dy[k] * d[k], dy[k] *= to.scale[k];
        store(dx + here, dy);
      }
      store(sum + at.row * p.width + c, s), store(product + at.row * p.width + c, q);
    }
  add_rows(sum, product, p, at.width);
  demb += (size_t)blockIdx.y * 2 * p.C + at.channel;
  for (int c = threadIdx.x; c < at.width; c += blockDim.x) demb[c] = product[c], demb[p.C + c] = sum[c];
}
EXPORT(modulate_backward)
