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

// The low or the high nibbles of kWidth bytes: the numbers, plus 8 but where a table gives them.
inline Vec load_nibbles(const uint8_t* p, bool high) {
#if defined(__AVX512F__)
  // The permutation looks at the low four bits of a lane alone.
  const __m512 numbers =
      _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
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

// load(c, k, v, n) of a layout: n inputs of row c from k + v on, v a constant below kRun.
// Without scales, or with one per channel, which is applied to the sums.
template <class T>
struct Plain {
  static constexpr bool grouped = false;
  static constexpr float kShift = 0.f;
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

// Layouts with scales per group: run(c, k, numbers) gives a run of kRun numbers of row c from k on,
// plus kShift, and a row's sum over it is scaled at once: scale_of(c, k) (sum - kShift sum of x).
constexpr int kRunVecs = kRun / kWidth;

template <class Numbers>
struct Grouped {
  static constexpr bool grouped = true;
  static constexpr float kShift = Numbers::kShift;
  const typename Numbers::Element* row[kChannels];
  int64_t ahead;
  const BFloat16* scale[kChannels];
  int shift;  // log2 of the group
  void run(int c, int64_t k, Vec (&numbers)[kRunVecs]) const {
    const auto* p = row[c] + k / Numbers::kInputs;
    prefetch(p, ahead);
    Numbers::load(p, numbers);
  }
  float scale_of(int c, int64_t k) const { return to_float(scale[c][k >> shift]); }
};

struct ByteNumbers {
  using Element = int8_t;
  static constexpr int kInputs = 1;  // of an element
  static constexpr float kShift = 0.f;
  static void load(const int8_t* p, Vec (&numbers)[kRunVecs]) {
#pragma GCC unroll 8
    for (int v = 0; v < kRunVecs; ++v) numbers[v] = load_bytes(p + v * kWidth);
  }
};
struct NibbleNumbers {
  using Element = uint8_t;
  static constexpr int kInputs = 2;
#if defined(__AVX512F__)
  static constexpr float kShift = 0.f;  // a table gives the numbers themselves
#else
  static constexpr float kShift = 8.f;
#endif
  static void load(const uint8_t* p, Vec (&numbers)[kRunVecs]) {
#pragma GCC unroll 4
    for (int v = 0; v < kRunVecs / 2; ++v) {
      numbers[v] = load_nibbles(p + v * kWidth, false);
      numbers[v + kRunVecs / 2] = load_nibbles(p + v * kWidth, true);
    }
  }
};
using Int8Grouped = Grouped<ByteNumbers>;
using Int4 = Grouped<NibbleNumbers>;

// The same numbers, unpacked: what several parts of a tile share.
template <class Stored>
struct Unpacked {
  static constexpr bool grouped = true;
  static constexpr float kShift = Stored::kShift;
  const float* row[kChannels];
  const BFloat16* scale[kChannels];
  int shift;
  void run(int c, int64_t k, Vec (&numbers)[kRunVecs]) const {
#pragma GCC unroll 8
    for (int v = 0; v < kRunVecs; ++v) numbers[v] = load(row[c] + k + v * kWidth);
  }
  float scale_of(int c, int64_t k) const { return to_float(scale[c][k >> shift]); }
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
