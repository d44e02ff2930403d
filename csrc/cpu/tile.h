// Products of small float32 tiles that stay in the first caches, in registers; and what goes with
// them: transposes and folds of a whole vector.
#pragma once

#include <utility>

#include "vec.h"

namespace fastft::FASTFT_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 of 16
#else
constexpr int kTileRows = 4, kTileVecs = 2;  // 8 of 16: products need a register of their own
#endif

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A view of float32 rows: in a tensor where it lies so already, else in scratch.
struct Rows {
  const float* data;
  int64_t stride;
  const float* operator[](int64_t row) const { return data + row * stride; }
};

// ---- lanes -----------------------------------------------------------------------------------

// Lane l of the result is lane take(l) of a, or of b where take(l) >= kWidth.
#if defined(__clang__)
#define FASTFT_LANES(a, b, take) __builtin_shufflevector(a, b, (take)...)
#else
#define FASTFT_LANES(a, b, take) __builtin_shuffle(a, b, IVec{int32_t(take)...})
#endif

template <int S, size_t... L>
inline Vec swap_lanes(Vec x, std::index_sequence<L...>) { return FASTFT_LANES(x, x, L ^ S); }
template <int S, size_t... L>
inline Vec low_lanes(Vec a, Vec b, std::index_sequence<L...>) {
  return FASTFT_LANES(a, b, (L & S) ? kWidth + L - S : L);
}
template <int S, size_t... L>
inline Vec high_lanes(Vec a, Vec b, std::index_sequence<L...>) {
  return FASTFT_LANES(a, b, (L & S) ? kWidth + L : L + S);
}
#undef FASTFT_LANES
using Lanes = std::make_index_sequence<kWidth>;

template <size_t... L>
inline Vec lane_numbers(std::index_sequence<L...>) { return Vec{float(L)...}; }

// All lanes folded into each lane.
template <int S = kWidth / 2, class Op>
inline Vec fold(Vec x, Op op) {
  x = op(x, swap_lanes<S>(x, Lanes{}));
  if constexpr (S > 1) return fold<S / 2>(x, op);
  return x;
}

template <int S = kWidth / 2>
inline void transpose(Vec (&rows)[kWidth]) {
#pragma GCC unroll 16
  for (int r = 0; r < kWidth; ++r) {
    if (r & S) continue;
    Vec a = rows[r], b = rows[r + S];
    rows[r] = low_lanes<S>(a, b, Lanes{});
    rows[r + S] = high_lanes<S>(a, b, Lanes{});
  }
  if constexpr (S > 1) transpose<S / 2>(rows);
}

// out[column][row] = in[row][column] for in: (rows, columns), out: (columns, stride); the columns
// of out from `rows` to the next multiple of kWidth become 0.
template <class T>
inline void transpose_tile(const T* in, int64_t in_stride, int64_t rows, int64_t columns,
                           float* out, int64_t stride) {
  for (int64_t row = 0; row < rows; row += kWidth)
    for_each_vec(columns, [&](int64_t column, auto n) {
      Vec square[kWidth];
      for (int r = 0; r < kWidth; ++r)
        square[r] = row + r < rows ? load(in + (row + r) * in_stride + column, n) : Vec{};
      transpose(square);
      for (int c = 0; c < n; ++c) store(out + (column + c) * stride + row, square[c]);
    });
}

// Rows as float32, the columns padded with 0 to a multiple of kWidth: in place where they are so.
template <class T>
inline Rows float_rows(const T* in, int64_t in_stride, int64_t rows, int64_t columns,
                       float* scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (columns % kWidth == 0) return {in, in_stride};
  int64_t stride = round_up(columns, kWidth);
  for (int64_t row = 0; row < rows; ++row)
    for_each_vec(columns, [&](int64_t i, auto n) {
      store(scratch + row * stride + i, load(in + row * in_stride + i, n));
    });
  return {scratch, stride};
}

// ---- products --------------------------------------------------------------------------------

// What is multiplied: element (i, k) of a lies at a[i * a_row + k * a_step], row k of b at
// b + k * b_step, row i of c at c + i * c_row. c = a b, or c += a b where `add`.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  float* c;
  int64_t c_row;
  int64_t steps;
  bool add;
};

template <int R, int V>
void tile_product(const Product& p, int64_t column) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      sums[r][v] = p.add ? load(p.c + r * p.c_row + column + v * kWidth) : Vec{};
  const float* a = p.a;
  const float* b = p.b + column;
  for (int64_t k = 0; k < p.steps; ++k, a += p.a_step, b += p.b_step) {
    Vec row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec scalar = broadcast(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(scalar, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(p.c + r * p.c_row + column + v * kWidth, sums[r][v]);
}

template <int R, int V = kTileVecs>
inline void columns_product(const Product& p, int64_t column, int vecs) {
  if constexpr (V > 1)
    if (vecs < V) return columns_product<R, V - 1>(p, column, vecs);
  tile_product<R, V>(p, column);
}

template <int R = kTileRows>
inline void rows_product(const Product& p, int rows, int64_t begin, int64_t end) {
  if constexpr (R > 1)
    if (rows < R) return rows_product<R - 1>(p, rows, begin, end);
  // Halves rather than a full tile and a thin rest, which would wait for its own sums.
  for (int64_t left = (end - begin) / kWidth; left > 0;) {
    int64_t vecs = left <= kTileVecs ? left : left < 2 * kTileVecs ? (left + 1) / 2 : kTileVecs;
    columns_product<R>(p, end - left * kWidth, int(vecs));
    left -= vecs;
  }
}

// The columns [begin, end), multiples of kWidth apart, of `rows` <= kTileRows rows.
inline void product(const Product& p, int rows, int64_t begin, int64_t end) {
  rows_product<>(p, rows, begin, end);
}

// How many rows the next tile takes when `left` are left.
inline int next_rows(int64_t left) {
  if (left <= kTileRows) return int(left);
  return left < 2 * kTileRows ? int((left + 1) / 2) : kTileRows;
}

}  // namespace fastft::FASTFT_ISA
