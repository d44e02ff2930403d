// Rounding of rows to int8, and the columns that stay out of it.
#include "int8_rounding.h"

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "vec.h"

#if defined(FASTFT_X86)
#include <emmintrin.h>
#endif

namespace fastft::FASTFT_ISA {
namespace {

inline void store_bytes(int8_t* p, IVec x, std::integral_constant<int, kWidth>) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < kWidth; ++i) p[i] = int8_t(x[i]);
#endif
}
inline void store_bytes(int8_t* p, IVec x, int64_t count) {
  for (int i = 0; i < count; ++i) p[i] = int8_t(x[i]);
}

template <class T>
void round_row(const T* x, const RoundRows& r, int8_t* values, float* scale) {
  auto value = [&](int64_t i, auto n) {
    const Vec loaded = load(x + i, n);
    return r.factors ? loaded * load(r.factors + i, n) : loaded;
  };
  Vec most{}, bad{};
  for_each_vec(r.columns, [&](int64_t i, auto n) {
    most = max(most, abs(value(i, n)));
    bad += value(i, n) * 0.f;
  });
  const float peak = max(most), nan = sum(bad);
  const bool any = peak > 127.f * 1.17549435e-38f && nan == 0.f;
  *scale = (any ? peak / 127.f : 0.f) + nan;
  const Vec inverse = broadcast(any ? 127.f / peak : 0.f);
  for_each_vec(r.columns, [&](int64_t i, auto n) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, the even one of two.
    const Vec rounded = fma(value(i, n), inverse, broadcast(12582912.f)) - 12582912.f;
    const IVec numbers = __builtin_convertvector(rounded, IVec);
    store_bytes(values + i, any ? numbers : IVec{}, n);
  });
}

}  // namespace

void round_rows(const RoundRows& r) {
  const int threads = threads_for(r.rows, r.rows * r.columns >= kGrain);
  by_dtype(r.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < r.rows; ++row) {
      const T* x = static_cast<const T*>(r.x) + row * r.stride;
      round_row(x, r, r.values + row * r.columns, r.scale + row);
      for (int64_t i = 0; i < r.count; ++i)
        r.apart[row * r.count + i] = to_float(x[r.chosen[i]]);
    }
  });
}

void column_peaks(const ColumnPeaks& c) {
  std::fill(c.peaks, c.peaks + c.columns, 0.f);
  const int threads = threads_for(c.rows, c.rows * c.columns >= kGrain);
  by_dtype(c.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> own(c.columns);
#pragma omp for schedule(static)
      for (int64_t row = 0; row < c.rows; ++row) {
        const T* x = static_cast<const T*>(c.x) + row * c.stride;
        for_each_vec(c.columns, [&](int64_t i, auto n) {
          store(own.data() + i, max(load(own.data() + i, n), abs(load(x + i, n))), n);
        });
      }
#pragma omp critical(fastft_column_peaks)
      for (int64_t i = 0; i < c.columns; ++i) c.peaks[i] = std::max(c.peaks[i], own[i]);
    }
  });
}

void int8_columns(const Int8Columns& c) {
  const int threads = threads_for(c.out, c.out * c.count >= kGrain);
#pragma omp parallel for num_threads(threads)
  for (int64_t o = 0; o < c.out; ++o)
    for (int64_t i = 0; i < c.count; ++i)
      c.y[i * c.out + o] = float(c.values[o * c.stride + c.chosen[i]]) * c.scale[o];
}

}  // namespace fastft::FASTFT_ISA
