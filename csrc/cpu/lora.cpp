// Thin products of low-rank adapters: register tiles over a wide matrix that is read once.
// Every element of a result is summed by one thread in one order: the same bits for any threads.
#include "lora.h"

#include <algorithm>
#include "scratch.h"
#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

typedef uint8_t MaskVec __attribute__((vector_size(kWidth)));

inline Vec load_mask(const uint8_t* p, std::integral_constant<int, kWidth>) {
  MaskVec bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
}
inline Vec load_mask(const uint8_t* p, int64_t count) {
  Vec out{};
  for (int i = 0; i < count; ++i) out[i] = p[i];
  return out;
}

// One row of the masked matrix as float32; `scratch` is used only where a conversion is due.
template <class T>
const float* masked_row(const LowRank& a, int64_t row, float* scratch) {
  const T* matrix = static_cast<const T*>(a.matrix) + row * a.matrix_stride;
  if constexpr (std::is_same_v<T, float>) {
    if (!a.mask) return matrix;
  }
  const uint8_t* mask = a.mask ? a.mask + row * a.columns : nullptr;
  for_each_vec(a.columns, [&](int64_t i, auto n) {
    Vec value = load(matrix + i, n);
    if (mask) value *= load_mask(mask + i, n) * a.keep_scale;
    store(scratch + i, value, n);
  });
  return scratch;
}

// ROWS x RANKS dot products at once.
template <int ROWS, int RANKS>
void dot_tile(const float* const* rows, const LowRank& a, int64_t row, int64_t rank) {
  Vec sums[ROWS][RANKS] = {};
  for_each_vec(a.columns, [&](int64_t i, auto n) {
    Vec x[ROWS];
    for (int m = 0; m < ROWS; ++m) x[m] = load(rows[m] + i, n);
    for (int r = 0; r < RANKS; ++r) {
      Vec w = load(a.wide + (rank + r) * a.columns + i, n);
      for (int m = 0; m < ROWS; ++m) sums[m][r] = fma(x[m], w, sums[m][r]);
    }
  });
  for (int m = 0; m < ROWS; ++m)
    for (int r = 0; r < RANKS; ++r)
      a.out[(row + m) * a.rank + rank + r] = sum(sums[m][r]) * a.scale;
}

template <int ROWS>
void dot_rows(const float* const* rows, const LowRank& a, int64_t row) {
  int64_t rank = 0;
  for (; rank + 4 <= a.rank; rank += 4) dot_tile<ROWS, 4>(rows, a, row, rank);
  for (; rank < a.rank; ++rank) dot_tile<ROWS, 1>(rows, a, row, rank);
}

// Columns are taken two vectors at a time, rows in runs that keep rounding errors from growing
// with the number of tokens.
constexpr int kStrip = 2;
constexpr int64_t kRun = 256;

template <class T, int RANKS>
void sum_strip(const LowRank& a, int64_t column, int64_t rank) {
  Vec totals[RANKS][kStrip] = {};
  const T* matrix = static_cast<const T*>(a.matrix) + column;
  for (int64_t start = 0; start < a.rows; start += kRun) {
    Vec sums[RANKS][kStrip] = {};
    for (int64_t row = start; row < std::min(start + kRun, a.rows); ++row) {
      Vec x[kStrip];
      for (int v = 0; v < kStrip; ++v) {
        x[v] = load(matrix + row * a.matrix_stride + v * kWidth);
        if (a.mask)
          x[v] *= load_mask(a.mask + row * a.columns + column + v * kWidth,
                            std::integral_constant<int, kWidth>{}) *
                  a.keep_scale;
      }
      const float* narrow = a.narrow + row * a.narrow_stride + rank;
      for (int r = 0; r < RANKS; ++r)
        for (int v = 0; v < kStrip; ++v)
          sums[r][v] = fma(x[v], broadcast(narrow[r]), sums[r][v]);
    }
    for (int r = 0; r < RANKS; ++r)
      for (int v = 0; v < kStrip; ++v) totals[r][v] += sums[r][v];
  }
  for (int r = 0; r < RANKS; ++r)
    for (int v = 0; v < kStrip; ++v)
      store(a.out + (rank + r) * a.columns + column + v * kWidth, totals[r][v] * a.scale);
}

template <class T>
void sum_column(const LowRank& a, int64_t column) {
  const T* matrix = static_cast<const T*>(a.matrix) + column;
  for (int64_t rank = 0; rank < a.rank; ++rank) {
    float total = 0.f;
    for (int64_t start = 0; start < a.rows; start += kRun) {
      float run = 0.f;
      for (int64_t row = start; row < std::min(start + kRun, a.rows); ++row) {
        float x = to_float(matrix[row * a.matrix_stride]);
        if (a.mask) x *= a.mask[row * a.columns + column] * a.keep_scale;
        run += x * a.narrow[row * a.narrow_stride + rank];
      }
      total += run;
    }
    a.out[rank * a.columns + column] = total * a.scale;
  }
}

template <class T>
void sum_columns(const LowRank& a, int64_t column, int64_t end) {
  if (end - column == kStrip * kWidth) {
    int64_t rank = 0;
    for (; rank + 8 <= a.rank; rank += 8) sum_strip<T, 8>(a, column, rank);
    for (; rank + 2 <= a.rank; rank += 2) sum_strip<T, 2>(a, column, rank);
    for (; rank < a.rank; ++rank) sum_strip<T, 1>(a, column, rank);
  } else {
    for (; column < end; ++column) sum_column<T>(a, column);
  }
}

template <class T, int ROWS, int STRIP, class Count>
void add_tile(const LowRank& a, int64_t row, int64_t column, Count count) {
  Vec sums[ROWS][STRIP] = {};
  for (int64_t r = 0; r < a.rank; ++r) {
    Vec w[STRIP];
    for (int v = 0; v < STRIP; ++v)
      w[v] = load(a.wide + r * a.columns + column + v * kWidth, count);
    for (int m = 0; m < ROWS; ++m) {
      Vec c = broadcast(a.narrow[(row + m) * a.narrow_stride + r]);
      for (int v = 0; v < STRIP; ++v) sums[m][v] = fma(c, w[v], sums[m][v]);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < STRIP; ++v) {
      T* matrix = static_cast<T*>(a.matrix) + (row + m) * a.matrix_stride + column + v * kWidth;
      Vec added = sums[m][v] * a.scale;
      if (a.mask)
        added *= load_mask(a.mask + (row + m) * a.columns + column + v * kWidth, count) *
                 a.keep_scale;
      store(matrix, load(matrix, count) + added, count);
    }
}

template <class T, int ROWS>
void add_rows(const LowRank& a, int64_t row) {
  int64_t i = 0;
  std::integral_constant<int, kWidth> whole;
  for (; i + 4 * kWidth <= a.columns; i += 4 * kWidth) add_tile<T, ROWS, 4>(a, row, i, whole);
  for (; i + kWidth <= a.columns; i += kWidth) add_tile<T, ROWS, 1>(a, row, i, whole);
  if (i < a.columns) add_tile<T, ROWS, 1>(a, row, i, a.columns - i);
}

}  // namespace

void low_rank_dot(const LowRank& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    bool converts = a.mask || !std::is_same_v<T, float>;
    const int threads = threads_for((a.rows + 3) / 4, a.rows * a.columns >= kGrain);
    Scratch scratch(converts ? 4 * a.columns : 0, threads);
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < a.rows; row += 4) {
      int64_t count = std::min<int64_t>(4, a.rows - row);
      const float* rows[4];
      for (int64_t m = 0; m < count; ++m)
        rows[m] = masked_row<T>(a, row + m, scratch.own() + (converts ? m * a.columns : 0));
      if (count == 4)
        dot_rows<4>(rows, a, row);
      else
        for (int64_t m = 0; m < count; ++m) dot_rows<1>(rows + m, a, row + m);
    }
  });
}

void low_rank_sum(const LowRank& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int64_t width = kStrip * kWidth;
#pragma omp parallel for if (a.rows * a.columns >= kGrain)
    for (int64_t column = 0; column < a.columns; column += width)
      sum_columns<T>(a, column, std::min(column + width, a.columns));
  });
}

void low_rank_add(const LowRank& a) {
  by_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
#pragma omp parallel for if (a.rows * a.columns >= kGrain)
    for (int64_t row = 0; row < a.rows; row += 4) {
      if (row + 4 <= a.rows)
        add_rows<T, 4>(a, row);
      else
        for (int64_t last = row; last < a.rows; ++last) add_rows<T, 1>(a, last);
    }
  });
}

}  // namespace fastft::FASTFT_ISA
