// A linear layer for few rows over a weight that lies as (in, out), as GPT-2's do: every output is
// summed over the inputs in order, in one lane, whatever is computed beside it.
#pragma once

#include <algorithm>

#include "scratch.h"
#include "stored_dot.h"

namespace fastft::FASTFT_ISA {

constexpr int kStreams = 8;  // rows of the weight that are read side by side

// sums[r][c] += x[r][k] w[k][c] for K inputs in ascending order; w's rows lie `stride` apart.
template <int K, class W>
void add_rows(const W* w, int64_t stride, const float* x, int64_t x_stride, int rows,
              int64_t columns, float* sums) {
  for_each_vec(columns, [&](int64_t c, auto n) {
    Vec weights[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) weights[k] = load(w + k * stride + c, n);
    for (int r = 0; r < rows; ++r) {
      Vec sum = load(sums + r * columns + c, n);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum = fma(broadcast(x[r * x_stride + k]), weights[k], sum);
      store(sums + r * columns + c, sum, n);
    }
  });
}

// Columns that a thread takes at a time.
inline int64_t transposed_columns(const QuantizedLinear& a, int threads) {
  return std::max<int64_t>(round_up(a.out / threads, 64), 64);
}
inline int64_t transposed_floats(const QuantizedLinear& a, int threads) {
  return threads * (kTile * round_up(a.in, 16) + (kTile + 1) * transposed_columns(a, threads));
}

// Shared by the threads of the region it is called in, in transposed_floats of memory.
template <class W, class T>
void transposed_layer(const QuantizedLinear& a, const RowSource* source, float* room) {
  const int threads = omp_get_num_threads();
  const int64_t columns = transposed_columns(a, threads), stride = round_up(a.in, 16);
  const int64_t parts = (a.out + columns - 1) / columns;
  // A few rows are made by every thread for itself, many by one for all.
  const bool single = a.rows <= kTile;
  float* xs = room + (single ? omp_get_thread_num() : 0) * kTile * stride;
  float* sums = room + threads * kTile * stride + omp_get_thread_num() * (kTile + 1) * columns;
  float* bias = sums + kTile * columns;
  auto fill = [&](int64_t row, int r) {
    if (source) source->fill(source->context, row + r, xs + r * stride);
    else to_floats(a.x, row + r, 0, a.in, xs + r * stride);
  };
  for (int64_t row = 0; row < a.rows; row += kTile) {
    const int rows = int(std::min(kTile, a.rows - row));
    if (single) {
      for (int r = 0; r < rows; ++r) fill(row, r);
    } else {
#pragma omp for schedule(static)
      for (int r = 0; r < rows; ++r) fill(row, r);
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * columns, own = std::min(columns, a.out - first);
      const W* w = static_cast<const W*>(a.values) + first;
      std::fill_n(sums, rows * own, 0.f);
      int64_t k = 0;
      for (; k + kStreams <= a.in; k += kStreams)
        add_rows<kStreams>(w + k * a.values_stride, a.values_stride, xs + k, stride, rows, own, sums);
      for (; k < a.in; ++k)
        add_rows<1>(w + k * a.values_stride, a.values_stride, xs + k, stride, rows, own, sums);
      for (int64_t c = 0; a.bias.data && c < own; ++c) bias[c] = float_at(a.bias, first + c);
      for (int r = 0; r < rows; ++r)
        for_each_vec(own, [&](int64_t c, auto n) {
          Vec total = load(sums + r * own + c, n);
          if (a.bias.data) total += load(bias + c, n);
          store(static_cast<T*>(a.y) + (row + r) * a.y_stride + first + c, total, n);
        });
    }
  }
}

}  // namespace fastft::FASTFT_ISA
