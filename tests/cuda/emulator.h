// Runs CUDA kernels on the host, so that values and bounds can be tested without a GPU.
//
// A block is a set of fibers, one per thread; blocks run one after another. A thread runs until it
// meets a barrier or a shuffle, and goes on when all that must meet there have come. Threads that
// never meet (a shuffle some lane has left) end the process with a message. Warps run one after
// another from barrier to barrier, after emulator_run_backwards from the last to the first, so that
// a missing barrier shows. What this cannot show: races within a warp, timing, inline PTX.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// One block at a time, so a block's shared memory may be the process's.
#define __shared__ static
#define __launch_bounds__(...)
#define FASTFT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  emulator::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, \
                   [&] { kernel(__VA_ARGS__); })
#define FASTFT_SHARED(name) char* name = emulator::shared()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum { cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerBlockOptin,
       cudaDevAttrMultiProcessorCount };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {

constexpr size_t kStack = 256 << 10;
// The consumer cards' shared memory; tests make it smaller to reach what does not fit.
inline int shared_of_processor = 100 << 10;
inline bool backwards = false;
inline cudaError_t last_error = cudaSuccess;

enum class Wait { nothing, block, warp, ended };  // for the lanes in the mask, or the block

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::nothing;
  unsigned mask = 0;
  dim3 index;
  uint64_t slot[2] = {};  // what this lane shows to its warp, in turn
  int turn = 0;
};

inline dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline size_t running = 0;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::unique_ptr<uint4[]> dynamic_shared;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s, in block (%u, %u, %u)\n", what, block_index.x, block_index.y,
               block_index.z);
  std::abort();
}

inline Fiber& self() { return fibers[running]; }
inline char* shared() { return reinterpret_cast<char*>(dynamic_shared.get()); }

inline void enter() {
  body();
  self().wait = Wait::ended;
  swapcontext(&self().context, &scheduler);
}

inline void wait_for(Wait what, unsigned mask) {
  self().wait = what;
  self().mask = mask;
  swapcontext(&self().context, &scheduler);
}

// Lets go on the lanes of a warp that wait for nobody else; false if there are none.
inline bool release_warp(size_t first) {
  bool any = false;
  for (size_t i = first; i < first + 32 && i < fibers.size(); ++i) {
    if (fibers[i].wait != Wait::warp) continue;
    unsigned mask = fibers[i].mask;
    bool complete = mask >> (i - first) & 1;
    for (size_t lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1)
        complete &= first + lane < fibers.size() && fibers[first + lane].wait == Wait::warp &&
                    fibers[first + lane].mask == mask;
    if (!complete) continue;
    for (size_t lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) fibers[first + lane].wait = Wait::nothing;
    any = true;
  }
  return any;
}

// A warp runs as far as it can before another starts: what lacks a barrier sees the worst order.
inline void run_warp(size_t first) {
  size_t lanes = fibers.size() - first < 32 ? fibers.size() - first : 32;
  do {
    for (size_t lane = 0; lane < lanes; ++lane) {
      running = first + (backwards ? lanes - 1 - lane : lane);
      if (self().wait == Wait::nothing) swapcontext(&scheduler, &self().context);
    }
  } while (release_warp(first));
}

// False when every thread has ended.
inline bool release_block() {
  size_t ended = 0, at_barrier = 0;
  for (Fiber& f : fibers) ended += f.wait == Wait::ended, at_barrier += f.wait == Wait::block;
  if (ended + at_barrier < fibers.size()) fail("a warp's threads wait in different places");
  for (Fiber& f : fibers)
    if (f.wait == Wait::block) f.wait = Wait::nothing;
  return at_barrier;
}

inline void run_block(size_t shared_bytes) {
  std::memset(dynamic_shared.get(), 0xff, shared_bytes);  // NaN in every float type
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& f = fibers[i];
    if (!f.stack) f.stack.reset(new char[kStack]);
    f.wait = Wait::nothing, f.turn = 0;
    f.index = dim3(i % block_size.x, i / block_size.x % block_size.y,
                   i / (block_size.x * block_size.y));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  size_t warps = (fibers.size() + 31) / 32;
  do {
    for (size_t warp = 0; warp < warps; ++warp) run_warp(32 * (backwards ? warps - 1 - warp : warp));
  } while (release_block());
}

// What kernels were allowed by cudaFuncSetAttribute.
inline std::map<const void*, int> allowed;

inline void launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                   std::function<void()> kernel) {
  // 48 KB unasked for, of which static memory, unknown here, takes its part.
  size_t limit = allowed.count(function) ? size_t(allowed[function]) : (48 << 10) - 1024;
  size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > size_t(shared_of_processor) ||
      shared_bytes > limit) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  body = std::move(kernel), block_size = block, grid_size = grid;
  fibers = std::vector<Fiber>(threads);
  dynamic_shared.reset(new uint4[(shared_bytes + 15) / 16]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) block_index = dim3(x, y, z), run_block(shared_bytes);
}

template <class T>
T exchange(T value, unsigned mask, unsigned from) {
  static_assert(sizeof(T) <= 8);
  Fiber& mine = self();
  size_t lane = running % 32, first = running - lane;
  int turn = mine.turn;
  mine.turn ^= 1;
  std::memcpy(&mine.slot[turn], &value, sizeof(T));
  wait_for(Wait::warp, mask);
  if (from >= 32 || !(mask >> from & 1)) fail("a shuffle reads a lane that does not take part");
  std::memcpy(&value, &fibers[first + from].slot[turn], sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::self().index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait_for(emulator::Wait::block, 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulator::wait_for(emulator::Wait::warp, mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  int lane = int(emulator::running % 32);
  return emulator::exchange(value, mask, lane / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return emulator::exchange(value, mask, unsigned(emulator::running % 32) ^ unsigned(with));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  unsigned lane = emulator::running % 32;
  return emulator::exchange(value, mask, lane + by < 32 ? lane + by : lane);
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : emulator::shared_of_processor;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* function, int, int value) {
  return emulator::allowed[function] = value, cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  cudaError_t error = emulator::last_error;
  return emulator::last_error = cudaSuccess, error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

extern "C" __attribute__((visibility("default"), used)) void emulator_shared(int bytes) {
  emulator::shared_of_processor = bytes;
}
extern "C" __attribute__((visibility("default"), used)) void emulator_run_backwards(bool yes) {
  emulator::backwards = yes;
}
