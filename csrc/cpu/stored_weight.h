// The storage layouts of a weight (fastft/ops/quantized_linear.py), read as vectors of floats:
// kChannels rows at a time.
#pragma once

#include "vec.h"

namespace fastft::FASTFT_ISA {

constexpr int kChannels = 4;
constexpr int64_t kRun = 32;  // inputs that 16 bytes of int4 hold
using Whole = std::integral_constant<int, kWidth>;

inline Vec load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
#endif
}

// The low or the high nibbles of kWidth bytes: numbers plus 8.
inline Vec load_nibbles(const uint8_t* p, bool high) {
#if defined(__AVX512F__)
  // The permutation looks at the low four bits of a lane alone.
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Vec)_mm512_permutexvar_ps(high ? _mm512_srli_epi32(lanes, 4) : lanes, numbers);
#else
#if defined(__AVX2__)
  IVec lanes =
      (IVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  IVec lanes = __builtin_convertvector(bytes, IVec);
#endif
  return __builtin_convertvector(high ? lanes >> 4 : lanes & 15, Vec);
#endif
}

// The same inputs of the channels that come next: rows are too short for the processor to see far.
inline void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(p) + ahead), 0, 2);
}

// load(c, k, v, n) of every layout: n inputs of row c from k + v on, v a constant below kRun.
// Without scales, or with one per channel, which is applied to the sums.
template <class T>
struct Plain {
  const T* row[kChannels];
  int64_t ahead;  // bytes from a channel to one that is read later
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count n) const {
    const T* p = row[c] + k + v;
    if (v * sizeof(T) % 64 == 0) prefetch(p, ahead);
    if constexpr (!std::is_same_v<T, int8_t>) {
      return FASTFT_ISA::load(p, n);
    } else if constexpr (std::is_same_v<Count, Whole>) {
      return load_bytes(p);
    } else {
      Vec out{};
      for (int i = 0; i < n; ++i) out[i] = p[i];
      return out;
    }
  }
};

// Rows of whole groups, so every vector is whole.
struct Int8Grouped {
  const int8_t* row[kChannels];
  int64_t ahead;
  const float* scale[kChannels];
  int shift;
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count) const {
    if (v == 0) prefetch(row[c] + k, ahead);
    return load_bytes(row[c] + k + v) * scale[c][k >> shift];
  }
};
struct Int4 {
  const uint8_t* row[kChannels];
  int64_t ahead;
  const float* scale[kChannels];
  int shift;
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count) const {
    const uint8_t* p = row[c] + k / 2 + v % 16;
    if (v == 0) prefetch(p, ahead);
    const Vec factor = broadcast(scale[c][k >> shift]);
    // (number + 8) scale - 8 scale, whose only rounding is that of the product.
    return fma(load_nibbles(p, v >= 16), factor, factor * -8.f);
  }
};

// Calls body(k, v, n) for every vector of [begin, end), begin a multiple of kRun.
template <class Body>
inline void for_each_input(int64_t begin, int64_t end, Body&& body) {
  int64_t k = begin;
  for (; k + kRun <= end; k += kRun) {
#pragma GCC unroll 8
    for (int v = 0; v < kRun; v += kWidth) body(k, v, Whole{});
  }
  for (; k + kWidth <= end; k += kWidth) body(k, 0, Whole{});
  if (k < end) body(k, 0, end - k);
}

}  // namespace fastft::FASTFT_ISA
