// Products of int8 numbers: widened to 16 bits in scratch memory, multiplied and added in pairs into
// 32 bits, which is exact. Two products an instruction and lane: twice the rate of float32.
#include "int8_product.h"

#include <algorithm>

#include "scratch.h"
#include "tile.h"
#include "vec.h"

#if defined(FASTFT_X86)
#include <emmintrin.h>
#endif

namespace fastft::FASTFT_ISA {
namespace {

constexpr int kPairs = 2 * kWidth;  // 16-bit numbers of a vector
constexpr int kOuts = 4;            // outputs of a tile
#if defined(__AVX512F__)
constexpr int kRows = 4;  // 16 of 32 registers hold sums
#else
constexpr int kRows = 2;  // 8 of 16
#endif
constexpr int64_t kOutBlock = 32;  // outputs whose weights are widened at a time: 96 KB of 1,536
constexpr int64_t kRowBlock = 64;  // rows that stay in the second cache beside them

typedef int16_t Halves __attribute__((vector_size(2 * kPairs)));

inline IVec multiply_add(Halves a, Halves b, IVec c) {
#if defined(__AVX512F__)
  return c + (IVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return c + (IVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(FASTFT_X86)
  return c + (IVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < kWidth; ++i)
    c[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
  return c;
#endif
}

inline Halves load_halves(const int16_t* p) {
  Halves out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// The compiler would read it again for every row: loads are what a tile is short of.
inline void keep_in_register(Halves& x) {
#if defined(FASTFT_X86)
  asm("" : "+x"(x));
#endif
}

// Lane c of the result is the sum of all lanes of sums[c]; integers take the floats' lane moves.
inline IVec fold(const IVec (&sums)[kOuts]) {
  auto pair = [](IVec x, IVec y) {
    return (IVec)low_lanes<1>((Vec)x, (Vec)y, Lanes{}) +
           (IVec)high_lanes<1>((Vec)x, (Vec)y, Lanes{});
  };
  const IVec a = pair(sums[0], sums[1]), b = pair(sums[2], sums[3]);
  IVec both = (IVec)low_lanes<2>((Vec)a, (Vec)b, Lanes{}) +
              (IVec)high_lanes<2>((Vec)a, (Vec)b, Lanes{});
  if constexpr (kWidth >= 8) both += (IVec)swap_lanes<4>((Vec)both, Lanes{});
  if constexpr (kWidth >= 16) both += (IVec)swap_lanes<8>((Vec)both, Lanes{});
  return both;
}

void widen(const int8_t* from, int64_t count, int64_t padded, int16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  std::fill(to + count, to + padded, int16_t(0));
}

// Weights of outputs [first, first + kOutBlock), (outputs, inner) whichever way they lie.
void widen_block(const Int8Product& p, int64_t first, int64_t padded, int16_t* to) {
  const int64_t count = std::min(kOutBlock, p.out - first);
  std::fill(to + count * padded, to + kOutBlock * padded, int16_t(0));
  if (!p.transposed) {
    for (int64_t o = 0; o < count; ++o)
      widen(p.b + (first + o) * p.b_stride, p.inner, padded, to + o * padded);
    return;
  }
  for (int64_t o = 0; o < count; ++o)
    std::fill(to + o * padded + p.inner, to + (o + 1) * padded, int16_t(0));
  for (int64_t k = 0; k < p.inner; ++k) {
    const int8_t* row = p.b + k * p.b_stride + first;
    for (int64_t o = 0; o < count; ++o) to[o * padded + k] = row[o];
  }
}

// R rows by kOuts outputs over all inputs.
template <int R>
void tile(const Int8Product& p, const int16_t* a, const int16_t* b, int64_t padded, int64_t row,
          int64_t first) {
  IVec sums[R][kOuts] = {};
  for (int64_t k = 0; k < padded; k += kPairs) {
    Halves x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = load_halves(a + r * padded + k);
#pragma GCC unroll 4
    for (int o = 0; o < kOuts; ++o) {
      Halves w = load_halves(b + o * padded + k);
      keep_in_register(w);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][o] = multiply_add(x[r], w, sums[r][o]);
    }
  }
  const int64_t count = std::min<int64_t>(kOuts, p.out - first);
  // A vector of kOuts: the lanes of the processor's are more, or as many.
  typedef float Outs __attribute__((vector_size(4 * kOuts)));
  Outs scale = Outs{} + 1.f, bias{};
  if (p.b_scale) std::memcpy(&scale, p.b_scale + first, 4 * count);
  if (p.bias) std::memcpy(&bias, p.bias + first, 4 * count);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const Vec folded = __builtin_convertvector(fold(sums[r]), Vec);
    Outs value;
    std::memcpy(&value, &folded, sizeof value);
    value = value * p.a_scale[row + r] * scale + bias;
    std::memcpy(p.y + (row + r) * p.out + first, &value, 4 * count);
  }
}

template <int R = kRows>
void tiles(const Int8Product& p, const int16_t* a, const int16_t* b, int64_t padded, int64_t row,
           int64_t rows, int64_t first) {
  if constexpr (R > 1)
    if (rows < R) return tiles<R - 1>(p, a, b, padded, row, rows, first);
  tile<R>(p, a, b, padded, row, first);
}

}  // namespace

void scale_sums(const ScaleSums& s) {
  const int threads = threads_for(s.rows, s.rows * s.columns >= kGrain);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < s.rows; ++row) {
    int32_t* sums = s.sums + row * s.columns;
    const float* total = s.total ? s.total + row * s.total_stride : nullptr;
    const float scale = s.row_scale[row];
    for_each_vec(s.columns, [&](int64_t i, auto n) {
      IVec whole{};
      std::memcpy(&whole, sums + i, 4 * n);
      Vec y = __builtin_convertvector(whole, Vec) * scale;
      if (s.column_scale) y *= load(s.column_scale + i, n);
      if (s.bias) y += load(s.bias + i, n);
      if (total) y += load(total + i, n);
      std::memcpy(sums + i, &y, 4 * n);
    });
  }
}

void int8_product(const Int8Product& p) {
  if (p.rows == 0 || p.out == 0) return;
  const int64_t padded = round_up(p.inner, kPairs), blocks = (p.out + kOutBlock - 1) / kOutBlock;
  const int threads = threads_for(p.rows * blocks, p.rows * p.inner * p.out >= kGrain);
  // Many processors share few outputs by their rows as well.
  const int64_t shares = std::clamp<int64_t>(2 * threads / std::max<int64_t>(blocks, 1), 1,
                                             (p.rows + kRowBlock - 1) / kRowBlock);
  const int64_t share = (p.rows + shares - 1) / shares;
  Scratch wide((p.rows * padded + 1) / 2), own((kOutBlock * padded + 1) / 2, threads);
  auto* a = reinterpret_cast<int16_t*>(wide.data);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < p.rows; ++row)
    widen(p.a + row * p.inner, p.inner, padded, a + row * padded);
#pragma omp parallel for num_threads(threads) schedule(guided)
  for (int64_t item = 0; item < blocks * shares; ++item) {
    const int64_t first = item / shares * kOutBlock, begin = item % shares * share;
    const int64_t last = std::min(first + kOutBlock, p.out);
    const int64_t end = std::min(begin + share, p.rows);
    auto* b = reinterpret_cast<int16_t*>(own.own());
    widen_block(p, first, padded, b);
    for (int64_t block = begin; block < end; block += kRowBlock)
      for (int64_t o = first; o < last; o += kOuts)
        for (int64_t row = block; row < std::min(block + kRowBlock, end); row += kRows)
          tiles(p, a + row * padded, b + (o - first) * padded, padded, row,
                std::min<int64_t>(kRows, std::min(block + kRowBlock, end) - row), o);
  }
}

}  // namespace fastft::FASTFT_ISA
