// Products of a few rows, rounded to int8, with kChannels rows of an int8 or int4 weight: integers
// within a run of kRun inputs, where one scale of x and one of the weight hold, floats beyond.
// Eight sums a run in every instruction set but the one with VNNI, which takes two runs at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "stored_weight.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {

constexpr int kRunSums = 8;  // of kRun / kRunSums neighbouring inputs each
// Runs that are multiplied at a time, of each row an integral number, and rows of x beside them.
#if defined(__AVX512VNNI__)
constexpr int kRunsAtOnce = 2, kRoundedRows = 4;  // with 4 channels, 16 of 32 registers hold sums
#elif defined(__AVX512F__)
constexpr int kRunsAtOnce = 1, kRoundedRows = 6;
#else
constexpr int kRunsAtOnce = 1, kRoundedRows = 3;
#endif
typedef float RunSums __attribute__((vector_size(4 * kRunSums)));
typedef int32_t RunInts __attribute__((vector_size(4 * kRunSums)));

// Rows of x in runs: x[k] is about bytes[k] * scales[k / kRun], zeros after the last input.
struct RoundedTile {
  const int8_t* bytes;  // (rows, runs, kRun)
  const float* scales;  // (rows, runs, kScales), all the same
  const int32_t* shifts;  // (rows, runs, kRunSums): what takes off the sums that numbers are stored
                          // plus 8
  int64_t runs;
  int rows;
};

constexpr int kScales = kRunsAtOnce > 1 ? kRunSums : 1;
constexpr int64_t runs_of(int64_t in) { return round_up((in + kRun - 1) / kRun, kRunsAtOnce); }

#if defined(__AVX512VNNI__)
// ---- two runs of four products an instruction, of numbers without sign and numbers with one --------

// Bytes of two runs of a weight, plus 8 << kMore; of the last runs only `left` inputs exist.
struct BytePair {
  static constexpr int kMore = 4;
  static __m512i load(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  static __m512i load(const int8_t* p, int64_t left) {
    const __mmask64 some = left < 64 ? (1ull << left) - 1 : ~0ull;
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, p), _mm512_set1_epi8(-128));
  }
};
struct NibblePair {
  static constexpr int kMore = 0;
  static __m512i spread(__m256i bytes) {
    // A run's 16 bytes twice, and the second time the high halves of them.
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3),
                                                   _mm512_castsi256_si512(bytes));
    const __m512i halves = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    return _mm512_and_si512(halves, _mm512_set1_epi8(15));
  }
  static __m512i load(const uint8_t* p) {
    return spread(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i load(const uint8_t* p, int64_t left) {
    return spread(_mm256_maskz_loadu_epi8(left < 64 ? (1u << left / 2) - 1 : ~0u, p));
  }
};

// The scales of two neighbouring runs of a channel, each in half of the lanes.
template <class Weights>
inline Vec scales_of(const Weights& w, int c, int64_t k, int64_t in) {
  uint32_t both;
  const BFloat16* p = w.scale[c] + (k >> w.shift);
  if (w.shift == 5 && k + kRun < in) std::memcpy(&both, p, sizeof both);
  else both = p->bits * 0x10001u;
  // The first in the low half of each number, to be moved up in the first half of the lanes.
  const __m512i moved = _mm512_sllv_epi32(_mm512_set1_epi32(int(both)),
                                          _mm512_setr_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0,
                                                            0, 0, 0, 0, 0));
  return (Vec)_mm512_and_si512(moved, _mm512_set1_epi32(int(0xffff0000)));
}

// sums[r][c] = x[row + r] * weights[c], but for the scale of a whole channel.
template <int R, class Weights>
void dot_runs(const Weights& w, const RoundedTile& x, int row, int64_t in,
              Vec (*sums)[kChannels]) {
  constexpr bool kNibbles = std::is_same_v<Weights, Int4>;
  using Pair = std::conditional_t<kNibbles, NibblePair, BytePair>;
  constexpr int64_t kPair = 2 * kRun;
  Vec own[R][kChannels] = {};
  auto add = [&](int64_t k, auto&& load) {
    __m512i numbers[kChannels];
    Vec scales[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      numbers[c] = load(w.row[c] + (kNibbles ? k / 2 : k));
      if constexpr (Weights::grouped) scales[c] = scales_of(w, c, k, in);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * x.runs + k / kRun;
      const __m512i bytes = _mm512_loadu_si512(x.bytes + at * kRun);
      const __m512i shift =
          _mm512_slli_epi32(_mm512_loadu_si512(x.shifts + at * kRunSums), Pair::kMore);
      const Vec scale = FASTFT_ISA::load(x.scales + at * kScales);
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) {
        const Vec dot = (Vec)_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(shift, numbers[c], bytes));
        own[r][c] = fma(dot, Weights::grouped ? scale * scales[c] : scale, own[r][c]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kPair <= in; k += kPair)
    add(k, [&](const auto* p) {
      prefetch(p, w.ahead);
      return Pair::load(p);
    });
  if (k < in) add(k, [&](const auto* p) { return Pair::load(p, in - k); });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) sums[r][c] = own[r][c];
}
#else

// A run of weights, ready to be multiplied. `bytes` are in [-127, 127].
#if defined(__AVX2__)
inline RunInts sum_pairs(__m256i products) {
  return (RunInts)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
struct ByteRun {
  // The instruction takes one side without sign: |w| * (sign of w) x. Two products fit 16 bits.
  __m256i size, number;
  static ByteRun load(const int8_t* p) {
    const __m256i number = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_abs_epi8(number), number};
  }
  RunInts sums(const int8_t* x, const int32_t*) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return sum_pairs(_mm256_maddubs_epi16(size, _mm256_sign_epi8(bytes, number)));
  }
};
struct NibbleRun {
  __m256i number;  // plus 8
  static NibbleRun load(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i both =
        _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1);
    return {_mm256_and_si256(both, _mm256_set1_epi8(15))};
  }
  RunInts sums(const int8_t* x, const int32_t* shift) const {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    RunInts off;
    std::memcpy(&off, shift, sizeof off);
    return sum_pairs(_mm256_maddubs_epi16(number, bytes)) + off;
  }
};
inline RunSums fma_run(RunInts a, float b, RunSums c) {
  return (RunSums)_mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)a), _mm256_set1_ps(b), (__m256)c);
}
#else
struct ByteRun {
  int8_t number[kRun];
  static ByteRun load(const int8_t* p) {
    ByteRun run;
    std::memcpy(run.number, p, kRun);
    return run;
  }
  RunInts sums(const int8_t* x, const int32_t*) const {
    RunInts sums{};
    for (int i = 0; i < kRun; ++i) sums[i / (kRun / kRunSums)] += int32_t(number[i]) * x[i];
    return sums;
  }
};
struct NibbleRun {
  int8_t number[kRun];  // plus 8
  static NibbleRun load(const uint8_t* p) {
    NibbleRun run;
    for (int i = 0; i < kRun / 2; ++i)
      run.number[i] = p[i] & 15, run.number[i + kRun / 2] = p[i] >> 4;
    return run;
  }
  RunInts sums(const int8_t* x, const int32_t* shift) const {
    RunInts off, sums{};
    std::memcpy(&off, shift, sizeof off);
    for (int i = 0; i < kRun; ++i) sums[i / (kRun / kRunSums)] += int32_t(number[i]) * x[i];
    return sums + off;
  }
};
inline RunSums fma_run(RunInts a, float b, RunSums c) {
  return __builtin_convertvector(a, RunSums) * b + c;
}
#endif

inline ByteRun load_run(const int8_t* p) { return ByteRun::load(p); }
inline NibbleRun load_run(const uint8_t* p) { return NibbleRun::load(p); }

// One vector of the width the other sums have.
inline Vec to_vec(RunSums sums) {
  Vec out{};
  if constexpr (kWidth >= kRunSums) {
    std::memcpy(&out, &sums, sizeof sums);
  } else {
    Vec halves[2];
    std::memcpy(halves, &sums, sizeof sums);
    out = halves[0] + halves[1];
  }
  return out;
}

// own[r][c] += x[row + r] * weights[c] over the i-th run, whose bytes of channel c load(c) gives.
template <int R, class Weights, class Load>
inline void add_run(const Weights& w, const RoundedTile& x, int row, int64_t i, Load&& load,
                    RunSums (&own)[R][kChannels]) {
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c) {
    const auto run = load(c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * x.runs + i;
      float scale = x.scales[at];
      if constexpr (Weights::grouped) scale *= w.scale_of(c, i * kRun);
      own[r][c] = fma_run(run.sums(x.bytes + at * kRun, x.shifts + at * kRunSums), scale, own[r][c]);
    }
  }
}

// sums[r][c] = x[row + r] * weights[c], but for the scale of a whole channel.
template <int R, class Weights>
void dot_runs(const Weights& w, const RoundedTile& x, int row, int64_t in,
              Vec (*sums)[kChannels]) {
  constexpr int64_t kPerElement = sizeof(w.row[0][0]) * (std::is_same_v<Weights, Int4> ? 2 : 1);
  RunSums own[R][kChannels] = {};
  const int64_t whole = in / kRun;
  for (int64_t i = 0; i < whole; ++i)
    add_run(w, x, row, i, [&](int c) {
      const auto* p = w.row[c] + i * (kRun / kPerElement);
      prefetch(p, w.ahead);
      return load_run(p);
    }, own);
  // Apart from the loop: the copy would cost it its registers. Only bytes end inside a run.
  if constexpr (kPerElement == 1)
    if (whole < x.runs)
      add_run(w, x, row, whole, [&](int c) {
        int8_t last[kRun] = {};
        std::copy_n(w.row[c] + whole * kRun, in - whole * kRun, last);
        return load_run(last);
      }, own);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) sums[r][c] = to_vec(own[r][c]);
}
#endif

template <int R = kRoundedRows, class Weights>
void dot_run_rows(const Weights& w, const RoundedTile& x, int row, int rows, int64_t in,
                  Vec (*sums)[kChannels]) {
  if constexpr (R > 1)
    if (rows < R) return dot_run_rows<R - 1>(w, x, row, rows, in, sums);
  dot_runs<R>(w, x, row, in, sums);
}

// A row of `in` floats rounded: the largest of a run becomes 127. NaN and infinity make the run's
// scale NaN, and so every result. A run so small that its scale would be subnormal counts as zeros.
inline void round_row(const float* x, int64_t in, int8_t* bytes, float* scales, int32_t* shifts) {
  for (int64_t i = 0; i < runs_of(in); ++i) {
    float run[kRun] = {};
    std::copy_n(x + i * kRun, std::clamp<int64_t>(in - i * kRun, 0, kRun), run);
    Vec most{}, zero{};
    for (int v = 0; v < kRun; v += kWidth) {
      most = max(most, abs(load(run + v)));
      zero += load(run + v) * 0.f;
    }
    const float peak = max(most), nan = sum(zero);
    const bool any = peak > 127.f * 1.17549435e-38f;
    std::fill_n(scales + i * kScales, kScales, (any ? peak / 127.f : 0.f) + nan);
    // No integer stands for NaN.
    if (nan != 0.f) std::fill_n(run, kRun, 0.f);
    const Vec inverse = broadcast(any && nan == 0.f ? 127.f / peak : 0.f);
    int32_t numbers[kRun];
    for (int v = 0; v < kRun; v += kWidth) {
      // Adding 1.5 * 2^23 rounds to the nearest integer, the even one of two.
      const Vec rounded = fma(load(run + v), inverse, broadcast(12582912.f)) - 12582912.f;
      const IVec integers = __builtin_convertvector(rounded, IVec);
      std::memcpy(numbers + v, &integers, sizeof integers);
    }
    for (int k = 0; k < kRun; ++k) bytes[i * kRun + k] = int8_t(numbers[k]);
    constexpr int kEach = kRun / kRunSums;
    for (int s = 0; s < kRunSums; ++s) {
      int32_t total = 0;
      for (int k = 0; k < kEach; ++k) total += numbers[s * kEach + k];
      shifts[i * kRunSums + s] = -8 * total;
    }
  }
}

}  // namespace fastft::FASTFT_ISA
