// The machine instructions of a matrix product, each with a twin for tests on a CPU. A twin is as late as
// the hardware may be: copies land and wgmma runs only when they are waited for, so that a missing wait
// shows. With an odd cpu::order copies land at once, and with half of the orders wgmma runs at once, as
// early as the hardware may: a place that is still read, or is not yet written, then shows.
#include "device_gpu.cuh"

// How the tile of an operand lies in shared memory: panels as wide as 128 bytes, rows of a panel one below
// the other, and chunk c (16 bytes) of row r at place c ^ (r % 8) of its row. Eight neighbouring rows of one
// chunk, or the eight chunks of one row, then touch all 32 banks once. wgmma calls this the 128-byte
// swizzle. `place` counts bytes. Shared memory is addressed by a number: a tile's address plus a place folds
// into one.
#define INLINE __device__ __forceinline__
constexpr int VEC = 16 / sizeof(T), PANEL = 128 / sizeof(T);  // elements of a chunk, of a panel's row
template <int ROWS> INLINE unsigned place(int row, int chunk) {
  return (chunk / 8 * ROWS + row) * 128 + (chunk % 8 ^ row % 8) * 16;
}

#ifdef __CUDACC__
INLINE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

INLINE void read_shared(float (&v)[4], unsigned p) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(p) : "memory");
}
INLINE void write_shared(unsigned p, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(v) : "memory");
}
INLINE void write_shared(unsigned p, bf16 v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(p), "h"(v) : "memory");
}

// 16 bytes from global to shared memory, or zeros (then src is not read): in the background from sm_80 on.
// cp_commit makes a group of the copies before it; cp_wait<N>: all but the last N groups have landed.
#if __CUDA_ARCH__ >= 800
INLINE void cp_async16(unsigned dst, const void* src, bool ok) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(ok ? 16 : 0));
}
INLINE void cp_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> INLINE void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#else
INLINE void cp_async16(unsigned dst, const void* src, bool ok) {
  uint4 v = ok ? *(const uint4*)src : uint4{0, 0, 0, 0};
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};"
               ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
INLINE void cp_commit() {}
template <int N> INLINE void cp_wait() {}
#endif

// Four 8x8 matrices of 16-bit elements; lane l points at row l % 8 of matrix l / 8. Lane l gets of each the
// elements (l / 4, 2 (l % 4)) and the next one; with TRANS those of the transposed matrix.
template <bool TRANS> INLINE void ldmatrix(unsigned (&r)[4], unsigned p) {
  if constexpr (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
}

// c (16x8) += a (16x16) b (16x8). Lane l holds c at rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
INLINE void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// what threads wrote to shared memory, in sight of wgmma, which reads by another path
INLINE void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// c (64xN, a warpgroup's) += a (64x16) b (16xN), in the background; a, b: descriptors, TA, TB: transposed.
// The instruction names all N / 2 registers of a thread: hence the lists.
#define W4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define W32(i) W4(i), W4(i + 4), W4(i + 8), W4(i + 12), W4(i + 16), W4(i + 20), W4(i + 24), W4(i + 28)
#define TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define R30 TEN("") TEN("1") TEN("2")
#define R60 R30 TEN("3") TEN("4") TEN("5")
#define R120 R60 TEN("6") TEN("7") TEN("8") TEN("9") TEN("10") TEN("11")
#define WGMMA_OF(n, registers, a, b, ta, tb) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 " \
  "{" registers "}, %" a ", %" b ", 1, 1, 1, %" ta ", %" tb ";"
template <int N, int TA, int TB>
INLINE void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b) {
  if constexpr (N == 64)
    asm volatile(WGMMA_OF("64", R30 "%30,%31", "32", "33", "34", "35")
                 : W32(0) : "l"(a), "l"(b), "n"(TA), "n"(TB));
  else if constexpr (N == 128)
    asm volatile(WGMMA_OF("128", R60 "%60,%61,%62,%63", "64", "65", "66", "67")
                 : W32(0), W32(32) : "l"(a), "l"(b), "n"(TA), "n"(TB));
  else
    asm volatile(WGMMA_OF("256", R120 "%120,%121,%122,%123,%124,%125,%126,%127", "128", "129", "130", "131")
                 : W32(0), W32(32), W32(64), W32(96) : "l"(a), "l"(b), "n"(TA), "n"(TB));
}
#else
inline unsigned shared_address(const void* p) { return (unsigned)((const char*)p - cpu::dynamic()); }
inline void read_shared(float (&v)[4], unsigned p) { memcpy(v, (float4*)(cpu::dynamic() + p), 16); }
template <class E> void write_shared(unsigned p, E v) { *(E*)(cpu::dynamic() + p) = v; }
inline void land(const cpu::Copy& c) { c.kept ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16); }
inline void cp_async16(unsigned dst, const void* src, bool ok) {
  if ((dst | (ok ? (uintptr_t)src : 0)) % 16) cpu::fail("cp.async: not aligned to 16 bytes");
  cpu::Copy copy = {cpu::dynamic() + dst, src, 16, ok ? 16 : 0};
  if (cpu::order % 2) land(copy);
  else cpu::cur->open.push_back(copy);
}
inline void cp_commit() { cpu::cur->groups.push_back(std::move(cpu::cur->open)); cpu::cur->open.clear(); }
template <int N> void cp_wait() {
  auto& groups = cpu::cur->groups;
  for (; (int)groups.size() > N; groups.erase(groups.begin()))
    for (auto& c : groups[0]) land(c);
}
// what lane l shows to its warp; two sets in turn, so that one barrier is enough
inline auto& shown(const void* p, size_t size) {
  auto& set = cpu::cur->warp->exchange[cpu::cur->shuffles++ & 1];
  memcpy(set[cpu::cur->lane], p, size);
  cpu::syncwarp();
  return set;
}
template <bool TRANS> void ldmatrix(unsigned (&r)[4], unsigned p) {
  if (p % 16) cpu::fail("ldmatrix: not aligned to 16 bytes");
  auto& set = shown(&p, sizeof p);
  int l = cpu::cur->lane, banks[4] = {};
  for (int j = 0; j < 32; j++) banks[j / 8] |= 1 << set[j][0] / 16 % 8;
  for (int b : banks) if (b != 255) cpu::fail("ldmatrix: two rows of a matrix in the same banks");
  for (int j = 0; j < 4; j++) {
    unsigned v[2];
    for (int e = 0; e < 2; e++) {
      int row = TRANS ? 2 * (l % 4) + e : l / 4, col = TRANS ? l / 4 : 2 * (l % 4) + e;
      v[e] = ((const bf16*)(cpu::dynamic() + set[8 * j + row][0]))[col];
    }
    r[j] = v[0] | v[1] << 16;
  }
}
inline float half_of(unsigned pair, int high) { return to_float((bf16)(high ? pair >> 16 : pair)); }
inline void mma16816(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  auto& set = shown(mine, sizeof mine);
  int l = cpu::cur->lane;
  for (int i = 0; i < 4; i++) {
    int row = l / 4 + 8 * (i / 2), col = 2 * (l % 4) + i % 2;
    for (int k = 0; k < 16; k++)
      c[i] += half_of(set[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
              half_of(set[col * 4 + k % 8 / 2][4 + k / 8], k % 2);
  }
}
struct Wgmma { float* c; uint64_t a, b; void (*run)(float*, uint64_t, uint64_t); };
struct WgmmaQueue { std::vector<Wgmma> open; std::vector<std::vector<Wgmma>> groups; };
inline WgmmaQueue& wgmma_queue() { static std::vector<WgmmaQueue> all(1024); return all[threadIdx.x]; }
inline void wgmma_fence() {}
inline void proxy_fence() {}
inline void wgmma_commit() { auto& q = wgmma_queue(); q.groups.push_back(std::move(q.open)); q.open.clear(); }
template <int N> void wgmma_wait() {
  auto& groups = wgmma_queue().groups;
  for (; (int)groups.size() > N; groups.erase(groups.begin()))
    for (auto& w : groups[0]) w.run(w.c, w.a, w.b);
  cpu::syncwarp();
}
// element (row, k) of what a descriptor describes; TRANS: rows lie in panels of 64, 8 k in a group
inline float described(uint64_t d, bool trans, int row, int k) {
  int lead = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4, at = (d & 0x3fff) << 4;
  if (d >> 62 != 1) cpu::fail("wgmma: not the 128-byte swizzle");
  at += trans ? row / 64 * lead + k / 8 * stride + k % 8 * 128 + row % 64 * 2
              : row / 8 * stride + row % 8 * 128 + k * 2;
  return to_float(*(const bf16*)(cpu::dynamic() + (at ^ (at >> 7 & 7) << 4)));
}
template <int N, int TA, int TB> void wgmma_now(float* c, uint64_t a, uint64_t b) {
  int l = cpu::cur->lane, w = threadIdx.x / 32 % 4;
  for (int i = 0; i < N / 2; i++) {
    int row = 16 * w + l / 4 + 8 * (i % 4 / 2), col = i / 4 * 8 + l % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) c[i] += described(a, TA, row, k) * described(b, TB, col, k);
  }
}
template <int N, int TA, int TB> void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b) {
  if (cpu::order % 4 >= 2) wgmma_now<N, TA, TB>(c, a, b);
  else wgmma_queue().open.push_back({c, a, b, wgmma_now<N, TA, TB>});
}
#endif

// What wgmma needs to know of a tile whose panels have ROWS rows: its address, the bytes from panel to panel
// (used where an operand is transposed), from one group of 8 rows to the next, and the kind of swizzle.
template <int ROWS> INLINE uint64_t descriptor(unsigned tile) {
  constexpr uint64_t panel = ROWS * 128, group = 8 * 128, swizzle = 1;
  return swizzle << 62 | group >> 4 << 32 | panel >> 4 << 16 | (tile & 0x3ffff) >> 4;
}
