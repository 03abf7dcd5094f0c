// Runs the package's CUDA kernels on the CPU, for tests. Every CUDA thread is a fiber, blocks run one after
// another, and a fiber gives way at barriers only: so a barrier that is missing shows under some order of the
// threads (cpu_order), and one that not all threads reach is reported as a deadlock. Shared memory is filled
// with NaN before every block. Only what the kernels use is here; twins of machine instructions stand beside
// them in device_gpu.cuh.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// All shared variables of a module lie in one section, so that they can be poisoned together. They must be
// declared in kernels or functions that are no templates: a template's would need another kind of section.
#define __shared__ static __attribute__((section("cuda_shared")))
extern char cuda_shared_first[] __asm__("__start_cuda_shared") __attribute__((weak));
extern char cuda_shared_end[] __asm__("__stop_cuda_shared") __attribute__((weak));

struct dim3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

namespace cpu {  // its variables are one for all modules of a process, the fibers too
struct Warp {  // `exchange`: what lanes show each other; two sets, so that one barrier per shuffle is enough
  int count = 0; unsigned generation = 0; unsigned exchange[2][32][16]; const void* pointer[32];
};
struct Copy { void* to; const void* from; int bytes, kept; };  // the bytes after the first `kept` become 0
struct Fiber {
  dim3 tid; int lane, shuffles = 0; Warp* warp; bool done = false, started = false;
  ucontext_t context; jmp_buf at;
  std::vector<Copy> open; std::vector<std::vector<Copy>> groups;  // asynchronous copies, not yet landed
};
inline std::vector<Fiber*> fibers; inline std::vector<Warp> warps; inline Fiber* cur;
inline jmp_buf scheduler; inline dim3 bid, bdim, gdim; inline unsigned threads, live, progress, generation;
inline int count, order = 0; inline std::vector<char> smem; inline size_t smem_size;
inline const std::function<void()>* body;
constexpr size_t STACK = 96 << 10;  // bytes for a thread's locals

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "%s (block %u,%u,%u thread %u,%u,%u)\n", what, bid.x, bid.y, bid.z,
          cur ? cur->tid.x : 0, cur ? cur->tid.y : 0, cur ? cur->tid.z : 0);
  abort();
}
inline void yield() { if (!_setjmp(cur->at)) _longjmp(scheduler, 1); }
inline void forever() {  // a fiber is made once and runs the same thread of block after block
  for (;;) { (*body)(); cur->done = true; progress++; live--; yield(); }
}
inline void wait_for(int& count, unsigned& generation, int n) {
  unsigned g = generation; progress++;
  if (++count == n) { count = 0; generation++; } else while (generation == g) yield();
}
inline void syncwarp() { wait_for(cur->warp->count, cur->warp->generation, 32); }
inline void syncblock() { wait_for(count, generation, threads); }
inline void resume(Fiber& f) {
  cur = &f;
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true; setcontext(&f.context);
}
inline void run_block() {
  for (unsigned t = 0; t < threads; t++) {
    Fiber& f = *fibers[t];
    f.tid = {t % bdim.x, t / bdim.x % bdim.y, t / bdim.x / bdim.y}; f.lane = t % 32; f.warp = &warps[t / 32];
    f.done = false; f.shuffles = 0; f.open.clear(); f.groups.clear();
  }
  memset(smem.data(), 0xff, smem.size());
  if (cuda_shared_first) memset(cuda_shared_first, 0xff, cuda_shared_end - cuda_shared_first);
  unsigned rng = order * 2654435761u + 1;
  for (live = threads; live;) {  // order 0: threads in turn; else from a random one, up or down
    unsigned before = progress, t = 0, step = 1;
    if (order) {
      rng = rng * 1664525u + 1013904223u;
      t = (rng >> 8) % threads, step = rng >> 4 & 1 ? 1 : threads - 1;
    }
    for (unsigned i = 0; i < threads; i++, t = (t + step) % threads) if (!fibers[t]->done) resume(*fibers[t]);
    if (progress == before && live) fail("deadlock: a barrier that not every thread reaches");
  }
  for (unsigned t = 0; t < threads; t++)
    if (!fibers[t]->open.empty()) cur = fibers[t], fail("asynchronous copies that no group was made of");
}
inline void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  body = &kernel; gdim = grid; bdim = block; threads = block.x * block.y * block.z; smem_size = shared;
  if (threads % 32 || !threads || threads > 1024) cur = nullptr, fail("a block has 32, 64, ... 1024 threads");
  smem.resize(shared + 2048); warps.assign(threads / 32, Warp()); count = 0;
  while (fibers.size() < threads) {
    Fiber* f = new Fiber; fibers.push_back(f);
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = malloc(STACK); f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, forever, 0);
  }
  for (bid.z = 0; bid.z < grid.z; bid.z++)
    for (bid.y = 0; bid.y < grid.y; bid.y++)
      for (bid.x = 0; bid.x < grid.x; bid.x++) run_block();
}
inline char* dynamic() { return (char*)(((uintptr_t)smem.data() + 1023) & ~(uintptr_t)1023); }
template <auto K> struct Entry;
template <class... A, void (*K)(A...)> struct Entry<K> {  // parameters as the void** of cuLaunchKernel
  template <size_t... I> static void call(void** p, std::index_sequence<I...>) { K(*(A*)p[I]...); }
  static void run(const unsigned* d, size_t shared, void** p) {
    launch({d[0], d[1], d[2]}, {d[3], d[4], d[5]}, shared, [=] { call(p, std::index_sequence_for<A...>()); });
  }
  static int size_of(int i) {  // of parameter i in bytes, a pointer's marked by 1 << 16; -1: there is none
    const int sizes[] = {(int)sizeof(A) | std::is_pointer_v<A> << 16 ..., -1};
    return sizes[i];
  }
};
}  // namespace cpu

#define threadIdx (cpu::cur->tid)
#define blockIdx cpu::bid
#define blockDim cpu::bdim
#define gridDim cpu::gdim
#define __syncthreads cpu::syncblock
#define __syncwarp() cpu::syncwarp()
#define DYN_SMEM(name) char* name = cpu::dynamic()
// EXPORT(k) after a kernel k makes cpu_k, which runs it, and args_k, which tells the sizes of its parameters
#define EXPORT(...) EXPORT_AS(__VA_ARGS__)
#define EXPORT_AS(name) \
  extern "C" void cpu_##name(const unsigned* d, size_t s, void** p) { cpu::Entry<&name>::run(d, s, p); } \
  extern "C" int args_##name(int i) { return cpu::Entry<&name>::size_of(i); }
extern "C" __attribute__((used, weak)) void cpu_order(int seed) { cpu::order = seed; }

template <class V> inline V cpu_shuffle(V v, int from) {  // every lane shows v and reads that of lane `from`
  auto& f = *cpu::cur; auto& set = f.warp->exchange[f.shuffles++ & 1];
  memcpy(set[f.lane], &v, sizeof v); cpu::syncwarp();
  V r; memcpy(&r, set[from & 31], sizeof r); return r;
}
template <class V> inline V __shfl_xor_sync(unsigned, V v, int mask) {
  return cpu_shuffle(v, cpu::cur->lane ^ mask);
}
template <class V> inline V __shfl_sync(unsigned, V v, int lane) { return cpu_shuffle(v, lane); }
template <class V> inline V __shfl_down_sync(unsigned, V v, int by) {
  int from = cpu::cur->lane + by; return cpu_shuffle(v, from < 32 ? from : cpu::cur->lane);
}
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __int_as_float(int u) { return __uint_as_float(u); }
inline int __float_as_int(float f) { return __float_as_uint(f); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline float __fmul_rn(float a, float b) { return a * b; }  // -ffp-contract=off keeps these two apart
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline double sinpi(double x) { return sin(M_PI * (x - 2 * rint(x / 2))); }
inline double cospi(double x) { return cos(M_PI * (x - 2 * rint(x / 2))); }
template <class V> inline V min(V a, V b) { return b < a ? b : a; }
template <class V> inline V max(V a, V b) { return a < b ? b : a; }
