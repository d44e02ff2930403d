// The storage layouts of a weight (fastft/ops/quantized_linear.py), read 16 bytes at a time: as
// floats, or as words of two numbers of a half type for the tensor cores.
//
// Numbers are made from bits, since conversions from integers are slow: 0x4b000000 + n are the bits
// of the float 2^23 + n, and 0x4300 + n, for n < 128, those of the bfloat16 128 + n, which are the
// upper half of those of the float.
#pragma once

#include "../../csrc/quantized_linear.h"
#include "common.cuh"

namespace fastft::cuda {

// ---- words -------------------------------------------------------------------------------------

// 16 bytes, of which `inside` belong to the row; the others become zero.
__device__ __forceinline__ void read16(uint32_t (&word)[4], const void* from, int64_t inside,
                                       bool aligned) {
  if (inside >= 16 && aligned) {
    uint4 all = *static_cast<const uint4*>(from);
    __builtin_memcpy(word, &all, 16);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word[i] = 0;
    for (int b = 0; b < 4; ++b)
      if (4 * i + b < inside)
        word[i] |= uint32_t(static_cast<const uint8_t*>(from)[4 * i + b]) << (8 * b);
  }
}

// 16 bytes at a multiple of 16, or zeros: one predicated load, which does not keep others waiting.
__device__ __forceinline__ void read16(uint32_t (&word)[4], const void* from, bool there) {
  uint4 all = {0, 0, 0, 0};
  if (there) all = *static_cast<const uint4*>(from);
  __builtin_memcpy(word, &all, 16);
}

// The low byte of `bits` less `offset`.
__device__ __forceinline__ float number(uint32_t bits, int offset) {
  return bit_cast<float>(0x4b000000u | (bits & 0xffu)) - float((1 << 23) + offset);
}

// Two floats rounded to a half type; the first is the lower one.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair<bfloat16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return from_float<bfloat16>(low).bits | uint32_t(from_float<bfloat16>(high).bits) << 16;
#endif
}
template <>
__device__ __forceinline__ uint32_t pair<float16>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return from_float<float16>(low).bits | uint32_t(from_float<float16>(high).bits) << 16;
#endif
}

// The nibbles at bits 0 and 16, less 8, times a scale, rounded once.
template <class T>
__device__ __forceinline__ uint32_t scaled_nibbles(uint32_t two, float scale) {
  return pair<T>(number(two & 15, 8) * scale, number(two >> 16 & 15, 8) * scale);
}
// One multiply-add for a subtraction and a product. The scale is a bfloat16: 8 bits, and 136 = 17 * 8
// takes 5, so the addend is exact and the sum is (n - 8) * scale, which is exact too. A zero may lose
// its sign, which no sum that starts from +0 shows. Scales from 2^120 on overflow the addend, but
// float16 ends at 2^16.
template <>
__device__ __forceinline__ uint32_t scaled_nibbles<float16>(uint32_t two, float scale) {
  const float low = bit_cast<float>((two << 16 & 0x000f0000u) | 0x43000000u);
  const float high = bit_cast<float>((two & 0x000f0000u) | 0x43000000u);
  return pair<float16>(fmaf(low, scale, -136.f * scale), fmaf(high, scale, -136.f * scale));
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// The scale is a bfloat16, so this rounds the same exact product.
template <>
__device__ __forceinline__ uint32_t scaled_nibbles<bfloat16>(uint32_t two, float scale) {
  uint32_t shifted = (two & 0x000f000fu) | 0x43004300u, exact, rounded;
  uint32_t scales = bit_cast<uint32_t>(scale) >> 16 | (bit_cast<uint32_t>(scale) & 0xffff0000u);
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"  // times 1, less 136
      : "=r"(exact) : "r"(shifted), "r"(0x3f803f80u), "r"(0xc308c308u));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"  // less 0
      : "=r"(rounded) : "r"(exact), "r"(scales), "r"(0x80008000u));
  return rounded;
}
#endif

// ---- layouts -------------------------------------------------------------------------------------

// 16 bytes of a row. A per-channel scale is not here: it is applied to the sums.
struct Piece {
  uint32_t word[4];
  float scale;  // of the group the piece lies in
};

// Of every layout: kInputs that a piece holds, kBits of one; the inputs [4 j, 4 j + 4) as floats by
// quad(piece, j, floats), and as two words of T by words<T>(piece, j, words), in the order 0 1 2 3,
// or 0 2 1 3 where kCrossed.
template <class T>
struct Plain {
  static constexpr int kInputs = 16 / sizeof(T), kBits = 8 * sizeof(T);
  static constexpr bool kGrouped = false, kCrossed = false;
  static __device__ __forceinline__ void quad(const Piece& p, int j, float (&w)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = bit_cast<float>(p.word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        w[2 * i] = low_half<T>(p.word[2 * j + i]);
        w[2 * i + 1] = high_half<T>(p.word[2 * j + i]);
      }
    }
  }
  template <class U>
  static __device__ __forceinline__ void words(const Piece& p, int j, uint32_t (&w)[2]) {
    w[0] = p.word[2 * j], w[1] = p.word[2 * j + 1];
  }
};

template <bool grouped>
struct Int8 {
  static constexpr int kInputs = 16, kBits = 8;
  static constexpr bool kGrouped = grouped, kCrossed = false;
  static __device__ __forceinline__ void quad(const Piece& p, int j, float (&w)[4]) {
    const uint32_t shifted = p.word[j] ^ 0x80808080u;  // -128 becomes 0
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[i] = number(shifted >> (8 * i), 128);
      if (grouped) w[i] *= p.scale;
    }
  }
  template <class T>
  static __device__ __forceinline__ void words(const Piece& p, int j, uint32_t (&w)[2]) {
    float all[4];
    quad(p, j, all);
    w[0] = pair<T>(all[0], all[1]), w[1] = pair<T>(all[2], all[3]);
  }
};

struct Int4 {
  static constexpr int kInputs = 32, kBits = 4;
  static constexpr bool kGrouped = true, kCrossed = true;
  static __device__ __forceinline__ uint32_t nibbles(const Piece& p, int j) {
    return p.word[j % 4] >> (j < 4 ? 0 : 4);
  }
  static __device__ __forceinline__ void quad(const Piece& p, int j, float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = number(nibbles(p, j) >> (8 * i) & 15, 8) * p.scale;
  }
  template <class T>
  static __device__ __forceinline__ void words(const Piece& p, int j, uint32_t (&w)[2]) {
    w[0] = scaled_nibbles<T>(nibbles(p, j), p.scale);
    w[1] = scaled_nibbles<T>(nibbles(p, j) >> 8, p.scale);
  }
};

// A row of the weight; past the last one, that one again, whose results nobody stores.
template <class Layout>
struct WeightRow {
  const char* values;
  const bfloat16* scales;

  __device__ WeightRow(const QuantizedLinear& a, int64_t channel) {
    channel = channel < a.out ? channel : a.out - 1;
    constexpr int size = Layout::kBits < 8 ? 1 : Layout::kBits / 8;
    values = static_cast<const char*>(a.values) + channel * a.values_stride * size;
    scales = static_cast<const bfloat16*>(a.scale) + channel * a.scale_stride;
  }
  // From input k on, a multiple of kInputs. Past the end, numbers of any value times 0.
  __device__ __forceinline__ Piece read(const QuantizedLinear& a, int k, bool aligned) const {
    Piece p;
    const int64_t at = int64_t(k) * Layout::kBits / 8, end = a.in * Layout::kBits / 8;
    read16(p.word, values + at, end - at, aligned);
    if constexpr (Layout::kGrouped) p.scale = scale(a, k);
    return p;
  }
  // The same where the row's pieces are whole and lie at multiples of 16 bytes.
  __device__ __forceinline__ Piece read_whole(const QuantizedLinear& a, int k) const {
    Piece p;
    read16(p.word, values + int64_t(k) * Layout::kBits / 8, k < a.in);
    if constexpr (Layout::kGrouped) p.scale = scale(a, k);
    return p;
  }
  __device__ __forceinline__ float scale(const QuantizedLinear& a, int k) const {
    return k < a.in ? to_float(scales[k >> (a.group == 64 ? 6 : 5)]) : 0.f;
  }
};

// Whether every piece lies at a multiple of 16 bytes.
template <class Layout>
__host__ __device__ __forceinline__ bool aligned_rows(const QuantizedLinear& a) {
  constexpr int size = Layout::kBits < 8 ? 1 : Layout::kBits / 8;
  return aligned16(a.values) && a.values_stride * size % 16 == 0;
}

}  // namespace fastft::cuda
