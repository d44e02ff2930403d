// Products of a few rows with kChannels rows of a stored weight: the sums of quantized_linear.
#pragma once

#include <algorithm>

#include "../quantized_linear.h"
#include "integer_dot.h"
#include "stored_weight.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {

#if defined(__AVX512F__)
constexpr int kMaxRows = 6;  // with 4 channels, 24 of 32 registers hold sums
#else
constexpr int kMaxRows = 3;  // 12 of 16
#endif
constexpr int64_t kTile = 16;    // rows that share one read of the weight
constexpr int64_t kSlice = 512;  // inputs of a tile that stay in the first cache, in 32 KB

using Sums = Vec[kTile][kChannels];

// Rows of a tile from some input on, and of what a layout's shift takes off each run of them.
struct Inputs {
  Rows x, shifts;
  Inputs from(int64_t row) const {
    return {{x[row], x.stride}, {shifts.data ? shifts[row] : nullptr, shifts.stride}};
  }
};

// own[r][c] += x[r] * weights[c], lane by lane, over the inputs [begin, end).
template <int R, class Weights>
inline void add_inputs(const Weights& w, const Inputs& in, int64_t begin, int64_t end,
                       Vec (&own)[R][kChannels]) {
  if constexpr (Weights::grouped) {
    for (int64_t k = begin; k < end; k += kRun)
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) {
        Vec numbers[kRunVecs];
        w.run(c, k, numbers);
        const Vec scale = broadcast(w.scale_of(c, k));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const float* x = in.x[r] + k;
          Vec run{};
          if constexpr (Weights::kShift != 0) run = load(in.shifts[r] + k / kRun * kWidth);
#pragma GCC unroll 8
          for (int v = 0; v < kRunVecs; ++v) run = fma(load(x + v * kWidth), numbers[v], run);
          own[r][c] = fma(run, scale, own[r][c]);
        }
      }
  } else {
    for_each_input(begin, end, [&](int64_t k, int v, auto n) {
      Vec weights[kChannels];
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) weights[c] = w.load(c, k, v, n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec value = load(in.x[r] + k + v);
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) own[r][c] = fma(value, weights[c], own[r][c]);
      }
    });
  }
}

template <int R, class Weights>
void dot(const Weights& w, Inputs in, int64_t begin, int64_t end, Vec (*sums)[kChannels]) {
  Vec own[R][kChannels];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) own[r][c] = sums[r][c];
  add_inputs<R>(w, in, begin, end, own);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) sums[r][c] = own[r][c];
}

template <int R = kMaxRows, class Weights>
inline void dot_rows(const Weights& w, Inputs in, int rows, int64_t begin, int64_t end,
                     Vec (*sums)[kChannels]) {
  if constexpr (R > 1)
    if (rows < R) return dot_rows<R - 1>(w, in, rows, begin, end, sums);
  dot<R>(w, in, begin, end, sums);
}

// Up to kTile rows as floats, with zeros after each up to a whole vector. Element (row, k) lies at
// data + row * stride + k. Many rows are packed in slices of kSlice inputs, `slice` floats apart:
// the rows of a tensor may lie a power of two apart, where the first cache holds only a few.
// shifts: -8 times the lane sums of every run, for layouts that store numbers plus 8; or null.
struct Tile {
  const float* data;
  int64_t stride, slice;
  int rows;
  const float* shifts;
  int64_t shift_stride;
  RoundedTile rounded;
};

// The same for a slice of more rows than fit the registers: unpacked once, then in parts.
template <class Weights>
void add_slice(const Weights& w, const Tile& x, int64_t begin, int64_t end, float* unpacked,
               Vec (*sums)[kChannels]) {
  auto add_parts = [&](const auto& floats) {
    const Inputs all{{x.data + begin / kSlice * x.slice, x.stride},
                     {x.shifts ? x.shifts + begin / kRun * kWidth : nullptr, x.shift_stride}};
    const int parts = (x.rows + kMaxRows - 1) / kMaxRows;
    for (int part = 0; part < parts; ++part) {
      const int first = x.rows * part / parts, last = x.rows * (part + 1) / parts;
      dot_rows(floats, all.from(first), last - first, 0, end - begin, sums + first);
    }
  };
  if constexpr (std::is_same_v<Weights, Plain<float>>) {
    Plain<float> floats = w;
    for (int c = 0; c < kChannels; ++c) floats.row[c] += begin;
    add_parts(floats);
  } else if constexpr (Weights::grouped) {
    Unpacked<Weights> floats{{}, {}, w.shift};
    for (int c = 0; c < kChannels; ++c) {
      float* slice = unpacked + c * kSlice;
      floats.row[c] = slice, floats.scale[c] = w.scale[c] + (begin >> w.shift);
      for (int64_t k = begin; k < end; k += kRun) {
        Vec numbers[kRunVecs];
        w.run(c, k, numbers);
        for (int v = 0; v < kRunVecs; ++v) store(slice + k - begin + v * kWidth, numbers[v]);
      }
    }
    add_parts(floats);
  } else {
    Plain<float> floats{};
    for (int c = 0; c < kChannels; ++c) {
      float* slice = unpacked + c * kSlice;
      floats.row[c] = slice;
      for_each_input(begin, end, [&](int64_t k, int v, auto n) {
        store(slice + k - begin + v, w.load(c, k, v, n));
      });
    }
    add_parts(floats);
  }
}

// sums[q] = x * weights[q] over all inputs; `unpacked` holds kChannels slices of floats.
template <class Weights>
void sum_tile(const Weights* w, int quads, const Tile& x, int64_t in, float* unpacked,
              Sums* sums) {
  for (int q = 0; q < quads; ++q)
    for (int r = 0; r < x.rows; ++r)
      for (int c = 0; c < kChannels; ++c) sums[q][r][c] = Vec{};
  if (x.rows <= kMaxRows) {
    for (int q = 0; q < quads; ++q)
      dot_rows(w[q], {{x.data, x.stride}, {x.shifts, x.shift_stride}}, x.rows, 0, in, sums[q]);
    return;
  }
  for (int64_t begin = 0; begin < in; begin += kSlice)
    for (int q = 0; q < quads; ++q)
      add_slice(w[q], x, begin, std::min(begin + kSlice, in), unpacked, sums[q]);
}

// The same with x rounded to int8.
template <class Weights>
void sum_rounded_tile(const Weights* w, int quads, const RoundedTile& x, int64_t in, Sums* sums) {
  for (int q = 0; q < quads; ++q)
    for (int row = 0; row < x.rows; row += kRoundedRows)
      dot_run_rows(w[q], x, row, std::min(kRoundedRows, x.rows - row), in, sums[q] + row);
}

// One row of any type as float32, padded with zeros to whole vectors.
inline void to_floats(const FloatRows& in, int64_t row, int64_t first, int64_t count, float* out) {
  by_dtype(in.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(in.data) + row * in.stride + first;
    for_each_vec(count, [&](int64_t i, auto n) { store(out + i, load(data + i, n)); });
  });
}

// The first number of a row.
inline float float_at(const FloatRows& in, int64_t row) {
  float out = 0.f;
  by_dtype(in.dtype, [&](auto element) {
    out = to_float(static_cast<const decltype(element)*>(in.data)[row * in.stride]);
  });
  return out;
}

}  // namespace fastft::FASTFT_ISA
