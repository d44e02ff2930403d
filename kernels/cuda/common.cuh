// What the CUDA kernels share: element types, 16-byte loads, reductions, the warp's matrix product.
//
// No torch header, and nothing of CUDA's that tests/cuda/emulator.h does not give too: the same file
// compiles with nvcc for a GPU and with a C++ compiler to run on the host, one fiber per thread.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cmath>
#define FASTFT_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
// Dynamic shared memory, 16-byte aligned.
#define FASTFT_SHARED(name) extern __shared__ uint4 name##_[]; \
  char* name = reinterpret_cast<char*>(name##_)
#else
#include "emulator.h"
#endif

#include "launch.h"

namespace fastft::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

// Half types by their bits: CUDA's own classes are not there on the host.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return float(bit_cast<_Float16>(x.bits));
#endif
}

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
#endif
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
#ifdef __CUDA_ARCH__
  float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  return {bit_cast<uint16_t>(_Float16(x))};
#endif
}

// As many elements as one 16-byte load brings.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T item[size];
};

// ... of a full pack, from an address that allows it or one that does not.
template <class T>
__device__ __forceinline__ Pack<T> load(const T* from, bool aligned) {
  Pack<T> pack;
  if (aligned) {
    uint4 words = *reinterpret_cast<const uint4*>(from);
    __builtin_memcpy(&pack, &words, 16);
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) pack.item[i] = from[i];
  }
  return pack;
}
template <class T>
__device__ __forceinline__ void store(T* to, const Pack<T>& pack, bool aligned) {
  if (aligned) {
    uint4 words;
    __builtin_memcpy(&words, &pack, 16);
    *reinterpret_cast<uint4*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::size; ++i) to[i] = pack.item[i];
  }
}
__host__ __device__ inline bool aligned16(const void* p) { return uintptr_t(p) % 16 == 0; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The sum or maximum over a block of up to 1,024 threads, whole warps; every thread gets it, in the
// same order always. All threads must call.
template <bool kMax>
__device__ __forceinline__ float block_reduce(float x) {
  __shared__ float of_warp[kWarp];
  x = kMax ? warp_max(x) : warp_sum(x);
  int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // of_warp may still be read from the last call
  if (lane == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < warps ? of_warp[lane] : kMax ? -INFINITY : 0.f;
  return kMax ? warp_max(x) : warp_sum(x);
}

// The product of one warp: c (16, 8) += a (16, 16) b (16, 8), float32 sums of half-type products.
// With g = lane / 4 and t = lane % 4, a word holding two neighbours along k, the lower one first:
//   a[0]: row g, k 2t     a[1]: row g + 8, k 2t     a[2], a[3]: the same with k 2t + 8
//   b[0]: k 2t, column g  b[1]: k 2t + 8            c[0], c[1]: row g, columns 2t, 2t + 1;
//                                                   c[2], c[3]: row g + 8
// (PTX ISA, mma.m16n8k16.) As fragments only meet along k, any order of k serves, if a and b share it.
template <class T>
__device__ __forceinline__ float low_half(uint32_t word) { return to_float(T{uint16_t(word)}); }
template <class T>
__device__ __forceinline__ float high_half(uint32_t word) {
  return to_float(T{uint16_t(word >> 16)});
}

// By shuffles: on the host, and for what sm_75 cannot (bfloat16).
template <class T>
__device__ inline void mma_by_shuffles(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  for (int half = 0; half < 2; ++half) {
    for (int s = 0; s < 4; ++s) {
      uint32_t top = __shfl_sync(kAll, a[2 * half], 4 * g + s);
      uint32_t bottom = __shfl_sync(kAll, a[2 * half + 1], 4 * g + s);
      for (int n = 0; n < 2; ++n) {
        uint32_t right = __shfl_sync(kAll, b[half], 4 * (2 * t + n) + s);
        c[n] = fmaf(low_half<T>(top), low_half<T>(right), c[n]);
        c[n] = fmaf(high_half<T>(top), high_half<T>(right), c[n]);
        c[n + 2] = fmaf(low_half<T>(bottom), low_half<T>(right), c[n + 2]);
        c[n + 2] = fmaf(high_half<T>(bottom), high_half<T>(right), c[n + 2]);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  mma_by_shuffles<bfloat16>(c, a, b);
#endif
}
template <>
__device__ __forceinline__ void mma<float16>(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#else
  mma_by_shuffles<float16>(c, a, b);
#endif
}

// Calls function with a value of the element type a DType names.
template <class F>
auto with_type(DType dtype, F&& function) {
  switch (dtype) {
    case DType::bfloat16: return function(bfloat16{});
    case DType::float16: return function(float16{});
    default: return function(float{});
  }
}

}  // namespace fastft::cuda
