// One matrix product for everything: out[m][n] = sum over k of A(m, k) B(k, n), A gathered from images.
//
// A convolution never builds its matrix of windows. With pixels p, taps t = (i, j), channels c and o:
//   LAYOUT NN  forward          m = p, k = (t, c), n = o   A = x at the pixel that tap t of p sees, B: weight
//          NT  data gradient    m = p, k = (t, o), n = c   A = dout at the pixel whose tap t is p, B: weight
//          TN  weight gradient  m = (t, c), k = p, n = o   A = x as in NN, B: dout
// The first letter says whether A's neighbours in memory differ in k (N) or in m (T, transposed), the second
// the reverse for B. So the weights (kh, kw, C, O) serve all three as they are. A linear layer and the
// products of attention are convolutions of one tap on images one row high.
//
// Defines: ELEMENT, the type T of the operands (float, bf16), and OUT of the result; BM x BN, what a block
// makes; WM x WN, what a thread (SIMT), warp (MMA) or warpgroup (WGMMA) makes of it; STAGES, tiles in
// flight; BLOCKS, to share a multiprocessor; A_STEP, B_STEP, elements per copy: 16 bytes of them, or 1 where
// rows do not start on 16 bytes; O_STEP, likewise of the result; MAIN: SIMT (plain FMA), MMA or WGMMA;
// EPILOGUE: PLAIN, SOFTMAX or DSOFTMAX. The sum over k runs in the same order for every tile size.
#include "mma_gpu.cuh"
enum { NN, NT, TN };
enum { SIMT, MMA, WGMMA };
enum { PLAIN, SOFTMAX, DSOFTMAX };

constexpr int BK = PANEL;  // k's per stage
constexpr int THREADS = BM / WM * (BN / WN) * (MAIN == WGMMA ? 128 : MAIN == MMA ? 32 : 1);
constexpr int A_TILE = (BM > PANEL ? BM : PANEL) * 128, B_TILE = (BN > PANEL ? BN : PANEL) * 128;  // bytes
constexpr bool A_ALONG_K = LAYOUT != TN, B_ALONG_K = LAYOUT == NT;
constexpr int A_ROWS = A_ALONG_K ? BM : BK, B_ROWS = B_ALONG_K ? BN : BK;  // of a panel in shared memory

// n / d for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery 1994): shift = ceil(log2 d) and
// factor = ceil(2^(31 + shift) / d) come from the host
struct Divisor {
  unsigned factor, shift;
  INLINE int operator()(int n) const { return __umulhi(2u * n, factor) >> shift; }
};

struct Gemm {
  int images, N, C, lda, ldb, ldo;  // C channels in one tap of A; elements from row to row
  int H, W, OH, OW, GH, GW;         // images of A; images that the pixels p belong to; of one class (below)
  int kh, kw, stride, pad;
  int parts, depth;  // TN: the k's fall into `parts` runs of `depth`; NT: stride * stride classes of pixels
  int heads, a_image, a_head, b_image, b_head, o_image, o_head;  // attention: from batch to batch
  Divisor by_area, by_width;        // by GH * GW, GW
  float alpha;
};

// The taps of one axis: the first one and their number, and where tap 0 of output 0 looks. The data gradient
// of a convolution of stride s splits the pixels into s classes per axis: pixel s q + r was seen by the taps
// i = (r + pad) mod s + s t only, of outputs q + (r + pad) / s - t (whole division). So no product is wasted.
struct Axis { int first, taps, start; };
INLINE Axis axis(int taps, int s, int pad, int r) {
  if (LAYOUT != NT) return {0, taps, -pad};
  int first = (r + pad) % s;
  return {first, first < taps ? (taps - first + s - 1) / s : 0, (r + pad) / s};
}

// bits i of 0 .. taps - 1 for which start + i lies in 0 .. size - 1
INLINE unsigned inside(int start, int taps, int size) {
  int low = max(0, -start), high = min(taps, size - start);
  return low < high ? (1u << high) - (1u << low) : 0;
}

template <int N> INLINE void copy(unsigned dst, const T* src, bool ok) {
  if constexpr (N == VEC) cp_async16(dst, src, ok);
  else write_shared(dst, ok ? *src : T(0));
}

// ---- main loops: a stage's share of the sum into registers, then registers into rows of `c` ----
template <int KIND, int TALL, int WIDE> struct Sum;  // its share of WM x WN

template <int TALL, int WIDE> struct Sum<SIMT, TALL, WIDE> {  // TALL x WIDE: what a thread makes, WIDE = 4
  static constexpr int ACROSS = BN / WIDE, CHUNKS = TALL / 4;
  float acc[TALL][WIDE] = {};
  // its rows and columns: neighbours where they share a chunk, else such that a warp reads many chunks
  static INLINE int m(int i) {
    return A_ALONG_K ? threadIdx.x / ACROSS + BM / TALL * i : threadIdx.x / ACROSS * TALL + i;
  }
  static INLINE int n(int j) {
    return B_ALONG_K ? threadIdx.x % ACROSS + ACROSS * j : threadIdx.x % ACROSS * WIDE + j;
  }
  INLINE void add(unsigned A, unsigned B) {
    #pragma unroll 2
    for (int kk = 0; kk < BK / 4; kk++) {
      float a[TALL][4], b[WIDE][4];  // [row][k], [column][k]; across where the tile runs the other way
      #pragma unroll
      for (int i = 0; i < TALL; i++)
        read_shared(a[i], A + (A_ALONG_K ? place<A_ROWS>(m(i), kk)
                                         : place<A_ROWS>(4 * kk + i / CHUNKS, m(0) / 4 + i % CHUNKS)));
      #pragma unroll
      for (int j = 0; j < WIDE; j++)
        read_shared(b[j], B + (B_ALONG_K ? place<B_ROWS>(n(j), kk) : place<B_ROWS>(4 * kk + j, n(0) / 4)));
      #pragma unroll
      for (int k = 0; k < 4; k++)
        #pragma unroll
        for (int i = 0; i < TALL; i++)
          #pragma unroll
          for (int j = 0; j < WIDE; j++)
            acc[i][j] += (A_ALONG_K ? a[i][k] : a[CHUNKS * k + i / 4][i % 4]) *
                         (B_ALONG_K ? b[j][k] : b[k][j]);
    }
  }
  INLINE void store(float* c, int pitch) {
    for (int i = 0; i < TALL; i++)
      for (int j = 0; j < WIDE; j++) c[m(i) * pitch + n(j)] = acc[i][j];
  }
};

template <int TALL, int WIDE> struct Sum<MMA, TALL, WIDE> {
  float acc[TALL / 16][WIDE / 8][4] = {};
  static INLINE int m() { return threadIdx.x / 32 / (BN / WIDE) * TALL; }
  static INLINE int n() { return threadIdx.x / 32 % (BN / WIDE) * WIDE; }
  INLINE void add(unsigned A, unsigned B) {
    const int lane = threadIdx.x % 32, low = lane % 8, mid = lane / 8 % 2, high = lane / 16;
    #pragma unroll
    for (int kk = 0; kk < BK / 16; kk++) {
      unsigned a[TALL / 16][4], b[WIDE / 16][4];
      #pragma unroll
      for (int i = 0; i < TALL / 16; i++)
        ldmatrix<!A_ALONG_K>(
            a[i], A + (A_ALONG_K ? place<A_ROWS>(m() + 16 * i + low + 8 * mid, 2 * kk + high)
                                 : place<A_ROWS>(16 * kk + low + 8 * high, m() / 8 + 2 * i + mid)));
      #pragma unroll
      for (int j = 0; j < WIDE / 16; j++)
        ldmatrix<!B_ALONG_K>(
            b[j], B + (B_ALONG_K ? place<B_ROWS>(n() + 16 * j + low + 8 * high, 2 * kk + mid)
                                 : place<B_ROWS>(16 * kk + low + 8 * mid, n() / 8 + 2 * j + high)));
      #pragma unroll
      for (int i = 0; i < TALL / 16; i++)
        #pragma unroll
        for (int j = 0; j < WIDE / 8; j++)
          mma16816(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  INLINE void store(float* c, int pitch) {
    const int lane = threadIdx.x % 32;
    #pragma unroll
    for (int i = 0; i < TALL / 16; i++)
      #pragma unroll
      for (int j = 0; j < WIDE / 8; j++)
        #pragma unroll
        for (int h = 0; h < 2; h++)
          *(float2*)(c + (m() + 16 * i + 8 * h + lane / 4) * pitch + n() + 8 * j + lane % 4 * 2) =
              float2{acc[i][j][2 * h], acc[i][j][2 * h + 1]};
  }
};

template <int TALL, int WIDE> struct Sum<WGMMA, TALL, WIDE> {  // a warpgroup (128 threads): 64 rows at a time
  float acc[TALL / 64][WIDE / 2] = {};
  static INLINE int m() { return threadIdx.x / 128 * TALL; }
  INLINE void add(unsigned A, unsigned B) {  // begins; the caller waits
    // from one k16 to the next: 32 bytes along a row, or 16 rows of 128 bytes; from 64 m's to the next: 8 KB
    uint64_t a = descriptor<A_ROWS>(A + m() * 128), b = descriptor<B_ROWS>(B);
    wgmma_fence();
    #pragma unroll
    for (int kk = 0; kk < BK / 16; kk++)
      #pragma unroll
      for (int i = 0; i < TALL / 64; i++)
        wgmma<WIDE, !A_ALONG_K, !B_ALONG_K>(acc[i], a + i * 512 + kk * (A_ALONG_K ? 2 : 128),
                                            b + kk * (B_ALONG_K ? 2 : 128));
    wgmma_commit();
  }
  INLINE void store(float* c, int pitch) {
    const int lane = threadIdx.x % 32, row = m() + threadIdx.x / 32 % 4 * 16 + lane / 4;
    #pragma unroll
    for (int i = 0; i < TALL / 64; i++)
      #pragma unroll
      for (int j = 0; j < WIDE / 8; j++)
        #pragma unroll
        for (int h = 0; h < 2; h++)
          *(float2*)(c + (row + 64 * i + 8 * h) * pitch + 8 * j + lane % 4 * 2) =
              float2{acc[i][4 * j + 2 * h], acc[i][4 * j + 2 * h + 1]};
  }
};

// PLAIN: alpha AB + bias (N,) + emb (images, N), for every pixel of its image, + residual (like out), where
// they are not null.  SOFTMAX: exp(alpha AB - rows[m]).  DSOFTMAX: residual (AB - rows[m]).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm(
    const T* __restrict__ a, const T* __restrict__ b, OUT* __restrict__ out, const float* __restrict__ bias,
    const float* __restrict__ emb, const T* __restrict__ residual, const float* __restrict__ rows, Gemm g) {
  DYN_SMEM(smem);
  const unsigned As = shared_address(smem), Bs = As + STAGES * A_TILE;
  const int tid = threadIdx.x, tiles = (g.N + BN - 1) / BN;
  const int m0 = blockIdx.x / tiles * BM, n0 = blockIdx.x % tiles * BN;
  const int batch = blockIdx.z / g.parts, part = blockIdx.z % g.parts;
  const int image = batch / g.heads, head = batch % g.heads;
  a += (size_t)image * g.a_image + head * g.a_head;
  b += (size_t)image * g.b_image + head * g.b_head;
  const bool back = LAYOUT == NT;  // then strides part the pixels into classes, and taps count the other way
  const int s = back ? g.stride : 1, mul = back ? 1 : g.stride, sign = back ? -1 : 1;
  const int class_y = back ? part / s : 0, class_x = back ? part % s : 0;
  const Axis v = axis(g.kh, s, g.pad, class_y), u = axis(g.kw, s, g.pad, class_x);
  const int area = g.GH * g.GW, pixels = g.images * area, M = LAYOUT == TN ? g.kh * g.kw * g.C : pixels;
  const int k_first = LAYOUT == TN ? part * g.depth : 0;
  const int k_last = LAYOUT == TN ? min(k_first + g.depth, pixels) : v.taps * u.taps * g.C;
  // pixel number n as (image, row, column); channel c of tap (i, j), which is k of NN and NT, m of TN
  struct Pixel { int image, y, x; };
  auto pixel_at = [&](int n) {
    int image = g.by_area(n), y = g.by_width(n - image * area);
    return Pixel{image, y, n - image * area - y * g.GW};
  };
  struct Tap { int i, j, c; };
  auto ahead = [&](Tap t, int n) {
    for (t.c += n; t.c >= g.C; t.c -= g.C)
      if (++t.j >= u.taps) t.j = 0, t.i++;
    return t;
  };

  // this thread's part of a tile: one column of chunks, and every so many rows
  constexpr int A_WIDE = (A_ALONG_K ? BK : BM) / VEC, A_SKIP = THREADS / A_WIDE, A_LOADS = A_ROWS / A_SKIP;
  constexpr int B_WIDE = (B_ALONG_K ? BK : BN) / VEC, B_SKIP = THREADS / B_WIDE, B_LOADS = B_ROWS / B_SKIP;
  const int a_chunk = tid % A_WIDE, a_row = tid / A_WIDE, b_chunk = tid % B_WIDE, b_row = tid / B_WIDE;
  Tap tap = ahead({0, 0, 0}, A_ALONG_K ? a_chunk * VEC : m0 + a_chunk * VEC);  // NN, NT: moves on with k
  // NN, NT: where tap (0, 0) of the thread's rows looks, and which taps look into the image: a bit for each
  // row of taps, 16 + one for each column; NT, which looks back, has them in reverse
  int base[A_LOADS];
  unsigned fits[A_LOADS];
  #pragma unroll
  for (int r = 0; A_ALONG_K && r < A_LOADS; r++) {
    const int m = m0 + a_row + r * A_SKIP;
    const Pixel p = pixel_at(m);
    const int y = p.y * mul + v.start, x = p.x * mul + u.start;
    base[r] = ((p.image * g.H + y) * g.W + x) * g.lda;
    fits[r] = inside(back ? y - v.taps + 1 : y, v.taps, g.H);
    fits[r] |= inside(back ? x - u.taps + 1 : x, u.taps, g.W) << 16;
    if (m >= M) fits[r] = 0;
  }
  const int b_column = n0 + b_chunk * VEC, columns_left = g.N - (B_ALONG_K ? n0 + b_row : b_column);
  b += B_ALONG_K ? (size_t)(n0 + b_row) * g.ldb : (size_t)(k_first + b_row) * g.ldb + b_column;
  int k0 = k_first;
  auto fetch = [&](int slot) {  // the next BK k's
    const unsigned A = As + slot * A_TILE, B = Bs + slot * B_TILE;
    if constexpr (A_ALONG_K) {
      #pragma unroll
      for (int e = 0; e < VEC; e += A_STEP) {
        const Tap t = e ? ahead(tap, e) : tap;
        const int i = back ? v.taps - 1 - t.i : t.i, j = back ? u.taps - 1 - t.j : t.j;
        const unsigned need = t.i < v.taps ? 1u << i | 0x10000u << j : 0x80008000u;  // that fits never
        const T* from = a + ((sign * t.i * g.W + sign * t.j) * g.lda + t.c);
        #pragma unroll
        for (int r = 0; r < A_LOADS; r++)
          copy<A_STEP>(A + place<A_ROWS>(a_row + r * A_SKIP, a_chunk) + e * sizeof(T), from + base[r],
                       (fits[r] & need) == need);
      }
    } else {
      Pixel p = pixel_at(k0 + a_row * A_LOADS);  // this thread's rows are neighbours
      int y, x, at;
      auto line = [&] {
        y = p.y * mul + v.start, x = p.x * mul + u.start, at = ((p.image * g.H + y) * g.W + x) * g.lda;
      };
      line();
      #pragma unroll
      for (int r = 0; r < A_LOADS; r++) {
        const int row = a_row * A_LOADS + r;
        #pragma unroll
        for (int e = 0; e < VEC; e += A_STEP) {
          const Tap t = e ? ahead(tap, e) : tap;
          const bool in = (unsigned)(y + t.i) < (unsigned)g.H && (unsigned)(x + t.j) < (unsigned)g.W;
          copy<A_STEP>(A + place<A_ROWS>(row, a_chunk) + e * sizeof(T),
                       a + ((t.i * g.W + t.j) * g.lda + t.c) + at, in && t.i < v.taps && k0 + row < k_last);
        }
        x += mul, at += mul * g.lda;
        if (++p.x == g.GW) {  // the next pixel begins a line
          p.x = 0;
          if (++p.y == g.GH) p.y = 0, p.image++;
          line();
        }
      }
    }
    #pragma unroll
    for (int e = 0; e < VEC; e += B_STEP) {
      const Tap t = B_ALONG_K && e ? ahead(tap, e) : tap;
      const T* from = b + e;
      int left = e < columns_left ? k_last - k0 - b_row : 0;  // rows of the tile that exist
      if (B_ALONG_K) {
        from = b + ((v.first + s * t.i) * g.kw + u.first + s * t.j) * g.N * g.ldb + t.c;
        left = t.i < v.taps ? columns_left : 0;
      }
      #pragma unroll
      for (int r = 0; r < B_LOADS; r++)
        copy<B_STEP>(B + place<B_ROWS>(b_row + r * B_SKIP, b_chunk) + e * sizeof(T),
                     from + r * B_SKIP * g.ldb, r * B_SKIP < left);
    }
    k0 += BK;
    if (A_ALONG_K) tap = ahead(tap, BK);
    if (!B_ALONG_K) b += (size_t)BK * g.ldb;
  };

  constexpr int AHEAD = STAGES - 1;  // loads run so many stages before the sum
  const int steps = (k_last - k_first + BK - 1) / BK;
  Sum<MAIN, WM, WN> sum;
  for (int st = 0; st < AHEAD; st++) {
    if (st < steps) fetch(st);
    cp_commit();
  }
  for (int st = 0, slot = 0, next = AHEAD; st < steps; st++) {
    cp_wait<AHEAD - 1>();
    if constexpr (MAIN == WGMMA) proxy_fence();
    __syncthreads();  // stage st is here; all but wgmma are done with stage st - 1, whose place `next` takes
    if constexpr (MAIN == WGMMA) {
      sum.add(As + slot * A_TILE, Bs + slot * B_TILE);
      wgmma_wait<1>();
      __syncthreads();  // now stage st - 1 is done; stage st runs while more is loaded
    }
    if (st + AHEAD < steps) fetch(next);
    cp_commit();
    if constexpr (MAIN != WGMMA) sum.add(As + slot * A_TILE, Bs + slot * B_TILE);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
    if (MAIN == WGMMA && st + 1 == steps) wgmma_wait<0>();  // behind the loop, ptxas would wait at every step
  }

  // Epilogue: through shared memory, so that global memory is read and written 16 bytes at a time.
  constexpr int PITCH = BN + 8;  // rows begin 8 banks apart: no two lanes of a fragment meet
  float* c = (float*)smem;
  __syncthreads();
  sum.store(c, PITCH);
  __syncthreads();
  #pragma unroll 4
  for (int q = tid; q < BM * BN / O_STEP; q += THREADS) {
    const int row = q / (BN / O_STEP), col = q % (BN / O_STEP) * O_STEP, m = m0 + row, n = n0 + col;
    if (m >= M || n >= g.N) continue;
    int pixel = m;
    if (back && s > 1) {
      const Pixel p = pixel_at(m);
      const int y = s * p.y + class_y, x = s * p.x + class_x;
      if (y >= g.OH || x >= g.OW) continue;
      pixel = (p.image * g.OH + y) * g.OW + x;
    }
    const size_t at = (size_t)image * g.o_image + head * g.o_head + (size_t)pixel * g.ldo + n +
                      (LAYOUT == TN ? (size_t)part * M * g.ldo : 0);
    float value[O_STEP], more[O_STEP];
    #pragma unroll
    for (int e = 0; e < O_STEP; e++) value[e] = c[row * PITCH + col + e];
    if (EPILOGUE == DSOFTMAX) {
      load(residual + at, more);
      for (int e = 0; e < O_STEP; e++) value[e] = more[e] * (value[e] - rows[batch * M + m]);
    } else {
      for (int e = 0; e < O_STEP; e++) value[e] *= g.alpha;
      auto plus = [&](auto* p) {
        load(p, more);
        for (int e = 0; e < O_STEP; e++) value[e] += more[e];
      };
      if (bias) plus(bias + n);
      if (emb) plus(emb + (size_t)g.by_area(m) * g.N + n);
      if (residual) plus(residual + at);
      if (EPILOGUE == SOFTMAX)
        for (int e = 0; e < O_STEP; e++) value[e] = expf(value[e] - rows[batch * M + m]);
    }
    store(out + at, value);
  }
}
EXPORT(gemm)
