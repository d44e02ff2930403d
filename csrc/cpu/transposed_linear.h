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

template <class W, class T>
void transposed_layer(const QuantizedLinear& a) {
  const int threads = threads_for((a.out + 63) / 64, a.rows * a.in * a.out >= kGrain);
  const int64_t columns = (a.out / threads + 63) / 64 * 64, parts = (a.out + columns - 1) / columns;
  const int64_t stride = round_up(a.in, kWidth);
  Scratch xs(kTile * stride), sums(kTile * columns, int(parts)), bias(a.bias.data ? a.out : 0);
  for (int64_t c = 0; a.bias.data && c < a.out; ++c) to_floats(a.bias, c, 0, 1, bias.data + c);
  for (int64_t row = 0; row < a.rows; row += kTile) {
    const int rows = int(std::min(kTile, a.rows - row));
    for (int r = 0; r < rows; ++r) to_floats(a.x, row + r, 0, a.in, xs.data + r * stride);
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * columns, own = std::min(columns, a.out - first);
      const W* w = static_cast<const W*>(a.values) + first;
      float* sum = sums.data + part * sums.size;
      std::fill_n(sum, rows * own, 0.f);
      int64_t k = 0;
      for (; k + kStreams <= a.in; k += kStreams)
        add_rows<kStreams>(w + k * a.values_stride, a.values_stride, xs.data + k, stride, rows, own,
                           sum);
      for (; k < a.in; ++k)
        add_rows<1>(w + k * a.values_stride, a.values_stride, xs.data + k, stride, rows, own, sum);
      for (int r = 0; r < rows; ++r)
        for_each_vec(own, [&](int64_t c, auto n) {
          Vec total = load(sum + r * own + c, n);
          if (a.bias.data) total += load(bias.data + first + c, n);
          store(static_cast<T*>(a.y) + (row + r) * a.y_stride + first + c, total, n);
        });
    }
  }
}

}  // namespace fastft::FASTFT_ISA
