// A linear layer for few rows: the weight is read once for 16 of them, unpacked in registers.
//
// Every result is one vector of sums over the inputs in order, folded at the end, whatever tile it
// was computed in: its bits depend neither on the other rows nor on the number of threads.
#include "quantized_linear.h"

#include <algorithm>

#include "scratch.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 6;  // with 4 channels, 24 of 32 registers hold sums
#else
constexpr int kMaxRows = 3;  // 12 of 16
#endif
constexpr int kChannels = 4;
constexpr int64_t kTile = 16;      // rows that share one read of the weight
constexpr int64_t kRun = 32;       // inputs that 16 bytes of int4 hold
constexpr int64_t kSlice = 512;    // inputs that are unpacked at once: 8 KB of floats
constexpr int64_t kBlock = 16;     // channels that one thread takes at a time
constexpr int64_t kChunk = 256;    // rows that are converted to float32 at once

using Whole = std::integral_constant<int, kWidth>;
using Sums = Vec[kTile][kChannels];

// ---- weights: kChannels rows of a layout, a vector at a time -----------------------------------
// load(c, k, v, n): inputs k + v on of row c, v a constant below kRun; n of them.

typedef int8_t Bytes __attribute__((vector_size(kWidth)));

inline Vec load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec);
#endif
}

// The numbers of the low or the high nibbles of kWidth bytes.
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
  typedef uint8_t UBytes __attribute__((vector_size(kWidth)));
  UBytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  IVec lanes = __builtin_convertvector(bytes, IVec);
#endif
  return __builtin_convertvector((high ? lanes >> 4 : lanes & 15) - 8, Vec);
#endif
}

template <class T>
struct Plain {
  const T* row[kChannels];
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count n) const {
    const T* p = row[c] + k + v;
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
  const float* scale[kChannels];
  int shift;
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count) const {
    return load_bytes(row[c] + k + v) * scale[c][k >> shift];
  }
};
struct Int4 {
  const uint8_t* row[kChannels];
  const float* scale[kChannels];
  int shift;
  template <class Count>
  Vec load(int c, int64_t k, int64_t v, Count) const {
    const uint8_t* p = row[c] + k / 2 + v % 16;
    return load_nibbles(p, v >= 16) * scale[c][k >> shift];
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

// ---- sums ----------------------------------------------------------------------------------------

// sums[r][c] += x[row + r] * weights[c], lane by lane, over the inputs [begin, end).
template <int R, class Weights>
void dot(const Weights& w, Rows x, int64_t begin, int64_t end, Vec (*sums)[kChannels]) {
  Vec own[R][kChannels];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) own[r][c] = sums[r][c];
  for_each_input(begin, end, [&](int64_t k, int v, auto n) {
    Vec weights[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) weights[c] = w.load(c, k, v, n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec value = load(x[r] + k + v);
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) own[r][c] = fma(value, weights[c], own[r][c]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) sums[r][c] = own[r][c];
}

template <int R = kMaxRows, class Weights>
inline void dot_rows(const Weights& w, Rows x, int rows, int64_t begin, int64_t end,
                     Vec (*sums)[kChannels]) {
  if constexpr (R > 1)
    if (rows < R) return dot_rows<R - 1>(w, x, rows, begin, end, sums);
  dot<R>(w, x, begin, end, sums);
}

// sums = x * weights for up to kTile rows; `unpacked` holds kChannels slices of floats.
template <class Weights>
void sum_tile(const Weights& w, Rows x, int rows, int64_t in, float* unpacked, Sums& sums) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kChannels; ++c) sums[r][c] = Vec{};
  if (rows <= kMaxRows) return dot_rows(w, x, rows, 0, in, sums);
  const int parts = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t begin = 0; begin < in; begin += kSlice) {
    const int64_t end = std::min(begin + kSlice, in);
    Plain<float> floats;
    for (int c = 0; c < kChannels; ++c) {
      float* slice = unpacked + c * kSlice;
      for_each_input(begin, end, [&](int64_t k, int v, auto n) {
        store(slice + k - begin + v, w.load(c, k, v, n));
      });
      floats.row[c] = slice;
    }
    for (int part = 0; part < parts; ++part) {
      const int first = rows * part / parts, last = rows * (part + 1) / parts;
      dot_rows(floats, Rows{x[first] + begin, x.stride}, last - first, 0,
               round_up(end - begin, kWidth), sums + first);
    }
  }
}

// ---- the layer -----------------------------------------------------------------------------------

// One row of any type as float32, padded with zeros to whole vectors.
void to_floats(const FloatRows& in, int64_t row, int64_t columns, float* out) {
  by_dtype(in.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(in.data) + row * in.stride;
    for_each_vec(columns, [&](int64_t i, auto n) { store(out + i, load(data + i, n)); });
  });
}

float first_of_row(const FloatRows& in, int64_t row) {
  float value = 0.f;
  by_dtype(in.dtype, [&](auto element) {
    value = to_float(static_cast<const decltype(element)*>(in.data)[row * in.stride]);
  });
  return value;
}

// kChannels rows from `first` on; past the last one, that one again, whose results nobody stores.
template <class T>
void point(const T* (&rows)[kChannels], const void* data, int64_t stride, int64_t first,
           int64_t count) {
  for (int c = 0; c < kChannels; ++c)
    rows[c] = static_cast<const T*>(data) + std::min(first + c, count - 1) * stride;
}

// What a thread needs for kChannels outputs beside their weights.
struct Channels {
  float* unpacked;  // kChannels slices
  float* scale;     // (kChannels, in / group)
  float* b;         // (kChannels, rank), rank in whole vectors
};

void point_scales(const float* (&rows)[kChannels], const QuantizedLinear& a, int64_t first,
                  float* scratch) {
  const int64_t groups = a.in / a.group;
  const BFloat16* scales[kChannels];
  point(scales, a.scale, a.scale_stride, first, a.out);
  for (int c = 0; c < kChannels; ++c) {
    float* out = scratch + c * groups;
    for_each_vec(groups, [&](int64_t i, auto n) { store(out + i, load(scales[c] + i, n), n); });
    rows[c] = out;
  }
}

template <class Weights>
Weights weights_at(const QuantizedLinear& a, int64_t first, float* scales) {
  Weights w;
  point(w.row, a.values, a.values_stride, first, a.out);
  if constexpr (std::is_same_v<Weights, Int8Grouped> || std::is_same_v<Weights, Int4>) {
    point_scales(w.scale, a, first, scales);
    w.shift = a.group == 64 ? 6 : 5;
  }
  return w;
}

// Not inlined, so that every row of every tile is rounded by the very same instructions.
template <class T>
[[gnu::noinline]] void finish_row(const QuantizedLinear& a, const Vec* sums, const Vec* added,
                                  int64_t channel, T* y) {
  for (int c = 0; c < kChannels && channel + c < a.out; ++c) {
    Vec total = sums[c];
    if (a.layout == WeightLayout::int8)
      total *= static_cast<const float*>(a.scale)[(channel + c) * a.scale_stride];
    if (a.rank) total = fma(added[c], broadcast(a.lora_scale), total);
    float value = fold(total, [](Vec p, Vec q) { return p + q; })[0];
    if (a.bias.data) value += first_of_row(a.bias, channel + c);
    from_float(value, y + c);
  }
}

// Rows [0, rows) of y for the outputs [first, last), from x and t = x A^T as floats.
template <class Weights, class T>
void layer_block(const QuantizedLinear& a, Rows x, Rows t, int64_t rows, int64_t first,
                 int64_t last, const Channels& scratch, T* y) {
  const int64_t rank = round_up(a.rank, kWidth);
  Sums sums, added;
  for (int64_t row = 0; row < rows; row += kTile) {
    const int count = int(std::min(kTile, rows - row));
    for (int64_t channel = first; channel < last; channel += kChannels) {
      auto w = weights_at<Weights>(a, channel, scratch.scale);
      sum_tile(w, Rows{x[row], x.stride}, count, a.in, scratch.unpacked, sums);
      if (a.rank) {
        Plain<float> b;
        for (int c = 0; c < kChannels; ++c) {
          to_floats(a.b, std::min(channel + c, a.out - 1), a.rank, scratch.b + c * rank);
          b.row[c] = scratch.b + c * rank;
        }
        sum_tile(b, Rows{t[row], t.stride}, count, rank, scratch.unpacked, added);
      }
      for (int r = 0; r < count; ++r)
        finish_row(a, sums[r], added[r], channel, y + (row + r) * a.out + channel);
    }
  }
}

// t = x A^T, padded with zeros to whole vectors.
template <class T>
void project(const QuantizedLinear& a, Rows x, int64_t rows, float* t) {
  const int64_t stride = round_up(a.rank, kWidth), tiles = (rows + kTile - 1) / kTile;
  const int64_t quads = stride / kChannels;
  const int threads = threads_for(tiles * quads, rows * a.in * a.rank >= kGrain);
  Scratch unpacked(kChannels * kSlice, threads);
#pragma omp parallel for num_threads(threads)
  for (int64_t item = 0; item < tiles * quads; ++item) {
    const int64_t row = item / quads * kTile, channel = item % quads * kChannels;
    const int count = int(std::min(kTile, rows - row));
    Plain<T> w;
    point(w.row, a.a.data, a.a.stride, channel, a.rank);
    Sums sums;
    sum_tile(w, Rows{x[row], x.stride}, count, a.in, unpacked.own(), sums);
    for (int r = 0; r < count; ++r)
      for (int c = 0; c < kChannels; ++c)
        t[(row + r) * stride + channel + c] =
            channel + c < a.rank ? fold(sums[r][c], [](Vec p, Vec q) { return p + q; })[0] : 0.f;
  }
}

template <class Weights, class T>
void layer(const QuantizedLinear& a) {
  const int64_t chunk = std::min(kChunk, a.rows), width = round_up(a.in, kWidth);
  const int64_t rank = round_up(a.rank, kWidth), groups = a.group ? a.in / a.group : 0;
  const int64_t blocks = (a.out + kBlock - 1) / kBlock;
  const int threads = threads_for(blocks, chunk * a.in * a.out >= kGrain);
  const bool converts = !std::is_same_v<T, float> || width != a.in;
  Scratch floats(converts ? chunk * width : 0), ts(chunk * rank);
  Scratch own(kChannels * (kSlice + groups + rank), threads);
  for (int64_t row = 0; row < a.rows; row += chunk) {
    const int64_t rows = std::min(chunk, a.rows - row);
    Rows x{static_cast<const float*>(a.x.data) + row * a.x.stride, a.x.stride};
    if (converts) {
#pragma omp parallel for if (rows * a.in >= kGrain)
      for (int64_t r = 0; r < rows; ++r) to_floats(a.x, row + r, a.in, floats.data + r * width);
      x = {floats.data, width};
    }
    Rows t{ts.data, rank};
    if (a.rank)
      by_dtype(a.a.dtype, [&](auto element) { project<decltype(element)>(a, x, rows, ts.data); });
    T* y = static_cast<T*>(a.y) + row * a.out;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks; ++block) {
      float* scratch = own.own();
      Channels channels{scratch, scratch + kChannels * kSlice,
                        scratch + kChannels * (kSlice + groups)};
      layer_block<Weights>(a, x, t, rows, block * kBlock, std::min((block + 1) * kBlock, a.out),
                           channels, y);
    }
  }
}

}  // namespace

void quantized_linear(const QuantizedLinear& a) {
  if (a.rows == 0 || a.out == 0) return;
  by_dtype(a.x.dtype, [&](auto element) {
    using T = decltype(element);
    switch (a.layout) {
      case WeightLayout::float32: return layer<Plain<float>, T>(a);
      case WeightLayout::bfloat16: return layer<Plain<BFloat16>, T>(a);
      case WeightLayout::float16: return layer<Plain<Float16>, T>(a);
      case WeightLayout::int8: return layer<Plain<int8_t>, T>(a);
      case WeightLayout::int8_grouped: return layer<Int8Grouped, T>(a);
      case WeightLayout::int4: return layer<Int4, T>(a);
    }
  });
}

}  // namespace fastft::FASTFT_ISA
