// A linear layer for few rows: the weight is read once for 16 of them, unpacked in registers.
//
// Every result is one vector of sums over the inputs in order, folded at the end, whatever tile it
// was computed in: its bits depend neither on the other rows nor on the number of threads.
#include "quantized_linear.h"

#include <algorithm>

#include "scratch.h"
#include "stored_weight.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 6;  // with 4 channels, 24 of 32 registers hold sums
#else
constexpr int kMaxRows = 3;  // 12 of 16
#endif
constexpr int kQuads = 4;        // kChannels outputs each: what a thread takes at a time
constexpr int64_t kTile = 16;    // rows that share one read of the weight
constexpr int64_t kSlice = 512;  // inputs of a tile that stay in the first cache, in 32 KB
constexpr int64_t kChunk = 256;  // rows that are made ready at once

using Sums = Vec[kTile][kChannels];

// ---- sums ----------------------------------------------------------------------------------------

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

// Lane c of the result, c < kChannels, is the sum of all lanes of sums[c].
inline Vec fold_channels(const Vec* sums) {
  Vec a = low_lanes<1>(sums[0], sums[1], Lanes{}) + high_lanes<1>(sums[0], sums[1], Lanes{});
  Vec b = low_lanes<1>(sums[2], sums[3], Lanes{}) + high_lanes<1>(sums[2], sums[3], Lanes{});
  Vec both = low_lanes<2>(a, b, Lanes{}) + high_lanes<2>(a, b, Lanes{});
  if constexpr (kWidth >= 8) both += swap_lanes<4>(both, Lanes{});
  if constexpr (kWidth >= 16) both += swap_lanes<8>(both, Lanes{});
  return both;
}

// ---- the layer -----------------------------------------------------------------------------------

// One row of any type as float32, padded with zeros to whole vectors.
void to_floats(const FloatRows& in, int64_t row, int64_t first, int64_t count, float* out) {
  by_dtype(in.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(in.data) + row * in.stride + first;
    for_each_vec(count, [&](int64_t i, auto n) { store(out + i, load(data + i, n)); });
  });
}

constexpr int64_t shift_floats(int64_t in) { return in / kRun * kWidth; }
constexpr int64_t tile_floats(int64_t in) {
  return kTile * (round_up(in, kSlice) + round_up(shift_floats(in), kWidth));
}

Tile make_tile(const QuantizedLinear& a, int64_t row, int rows, bool shifted, float* scratch) {
  const bool packed = rows > kMaxRows;
  Tile tile{scratch, packed ? kSlice : round_up(a.in, kSlice), packed ? rows * kSlice : kSlice,
            rows, nullptr, shift_floats(a.in)};
  if (!packed && a.x.dtype == DType::float32 && a.in % kWidth == 0) {
    tile.data = static_cast<const float*>(a.x.data) + row * a.x.stride, tile.stride = a.x.stride;
  } else {
    for (int64_t k = 0; k < a.in; k += kSlice)
      for (int r = 0; r < rows; ++r)
        to_floats(a.x, row + r, k, std::min(kSlice, a.in - k),
                  scratch + k / kSlice * tile.slice + r * tile.stride);
  }
  if (!shifted || NibbleNumbers::kShift == 0) return tile;
  float* shifts = scratch + kTile * round_up(a.in, kSlice);
  tile.shifts = shifts;
  for (int r = 0; r < rows; ++r)
    for (int64_t k = 0; k + kRun <= a.in; k += kRun) {
      const float* x = tile.data + k / kSlice * tile.slice + k % kSlice + r * tile.stride;
      if (!packed) x = tile.data + r * tile.stride + k;
      Vec total{};
      for (int v = 0; v < kRunVecs; ++v) total += load(x + v * kWidth);
      store(shifts + r * tile.shift_stride + k / kRun * kWidth, total * -NibbleNumbers::kShift);
    }
  return tile;
}

// kChannels rows from `first` on; past the last one, that one again, whose results nobody stores.
template <class T>
void point(const T* (&rows)[kChannels], const void* data, int64_t stride, int64_t first,
           int64_t count) {
  for (int c = 0; c < kChannels; ++c)
    rows[c] = static_cast<const T*>(data) + std::min(first + c, count - 1) * stride;
}

// How far ahead of its use a channel's data is asked for: whole turns of kChannels, and enough of
// them that memory answers in time also where channels are short.
int64_t ahead_of(int64_t channel_bytes) {
  constexpr int64_t kDistance = 8192;
  const int64_t turn = std::max<int64_t>(kChannels * channel_bytes, 1);
  return (kDistance + turn - 1) / turn * turn;
}

template <class Weights>
Weights weights_at(const QuantizedLinear& a, int64_t first, float* scales) {
  Weights w;
  point(w.row, a.values, a.values_stride, first, a.out);
  w.ahead = ahead_of(a.values_stride * int64_t(sizeof *w.row[0]));
  if constexpr (Weights::grouped) {
    const BFloat16* stored[kChannels];
    point(stored, a.scale, a.scale_stride, first, a.out);
    const int64_t groups = a.in / a.group;
    for (int c = 0; c < kChannels; ++c) {
      float* out = scales + c * groups;
      for_each_vec(groups, [&](int64_t i, auto n) { store(out + i, load(stored[c] + i, n), n); });
      w.scale[c] = out;
    }
    w.shift = a.group == 64 ? 6 : 5;
  }
  return w;
}

// What is left to do for kChannels outputs once their inputs are summed.
struct Finish {
  Vec scale, bias;
  float lora_scale;
  int count;  // outputs that exist
};

Finish finish_at(const QuantizedLinear& a, int64_t first) {
  Finish f{broadcast(1.f), Vec{}, a.rank ? a.lora_scale : 0.f,
           int(std::min<int64_t>(kChannels, a.out - first))};
  for (int c = 0; c < f.count; ++c) {
    if (a.bias.data)
      by_dtype(a.bias.dtype, [&](auto element) {
        using T = decltype(element);
        f.bias[c] = to_float(static_cast<const T*>(a.bias.data)[(first + c) * a.bias.stride]);
      });
    if (a.layout == WeightLayout::int8)
      f.scale[c] = static_cast<const float*>(a.scale)[(first + c) * a.scale_stride];
  }
  return f;
}

// Not inlined, so that every row of every tile is rounded by the very same instructions.
// Without sums, y holds what the adapter is added to.
template <class T>
[[gnu::noinline]] void finish_row(const Finish& f, const Vec* sums, const Vec* added, T* y) {
  Vec total = sums ? fma(fold_channels(sums), f.scale, f.bias) : load(y, f.count);
  if (added) total = fma(fold_channels(added), broadcast(f.lora_scale), total);
  store(y, total, f.count);
}

// What a thread works in.
struct Room {
  Room(float* data, const QuantizedLinear& a)
      : unpacked(data), scales(data + kChannels * kSlice), b(scales + kQuads * quad_scales(a)) {}
  static int64_t quad_scales(const QuantizedLinear& a) {
    return a.group ? kChannels * (a.in / a.group) : 0;
  }
  static int64_t floats(const QuantizedLinear& a) {
    return kChannels * (kSlice + round_up(a.rank, kWidth)) + kQuads * quad_scales(a);
  }
  float* unpacked;  // kChannels slices
  float* scales;    // (kQuads * kChannels, groups)
  float* b;         // (kChannels, rank), rank in whole vectors
};

// A tile of y for up to kQuads * kChannels outputs from `first` on; t is x A^T.
template <class Weights, class T>
void layer_block(const QuantizedLinear& a, const Tile& x, const Tile& t, int64_t first, Room room,
                 T* y) {
  const int64_t rank = round_up(a.rank, kWidth), left = (a.out - first + kChannels - 1) / kChannels;
  const int quads = int(std::min<int64_t>(kQuads, left));
  Sums sums[kQuads], added;
  if (!a.onto) {
    Weights w[kQuads] = {};
    for (int q = 0; q < quads; ++q)
      w[q] = weights_at<Weights>(a, first + q * kChannels, room.scales + q * Room::quad_scales(a));
    sum_tile(w, quads, x, a.in, room.unpacked, sums);
  }
  for (int q = 0; q < quads; ++q) {
    const int64_t channel = first + q * kChannels;
    if (a.rank) {
      Plain<float> b{};
      for (int c = 0; c < kChannels; ++c) {
        b.row[c] = room.b + c * rank;
        to_floats(a.b, std::min(channel + c, a.out - 1), 0, a.rank, room.b + c * rank);
      }
      sum_tile(&b, 1, t, rank, room.unpacked, &added);
    }
    const Finish finish = finish_at(a, channel);
    for (int r = 0; r < x.rows; ++r)
      finish_row(finish, a.onto ? nullptr : sums[q][r], a.rank ? added[r] : nullptr,
                 y + r * a.y_stride + channel);
  }
}

// Of a part's layout, chosen per block: parts that share their rows may be stored differently.
template <class T>
void layer_block(const QuantizedLinear& a, const Tile& x, const Tile& t, int64_t first, Room room,
                 T* y) {
  switch (a.layout) {
    case WeightLayout::float32: return layer_block<Plain<float>>(a, x, t, first, room, y);
    case WeightLayout::bfloat16: return layer_block<Plain<BFloat16>>(a, x, t, first, room, y);
    case WeightLayout::float16: return layer_block<Plain<Float16>>(a, x, t, first, room, y);
    case WeightLayout::int8: return layer_block<Plain<int8_t>>(a, x, t, first, room, y);
    case WeightLayout::int8_grouped: return layer_block<Int8Grouped>(a, x, t, first, room, y);
    case WeightLayout::int4: return layer_block<Int4>(a, x, t, first, room, y);
  }
}

// kChannels columns of t = x A^T from `first` on.
void project(const QuantizedLinear& a, const Tile& x, int64_t first, float* unpacked, float* t) {
  by_dtype(a.a.dtype, [&](auto element) {
    using T = decltype(element);
    Plain<T> w;
    point(w.row, a.a.data, a.a.stride, first, a.rank);
    w.ahead = kChannels * a.a.stride * int64_t(sizeof(T));
    Sums sums;
    sum_tile(&w, 1, x, a.in, unpacked, &sums);
    Finish finish{broadcast(1.f), Vec{}, 0.f, int(std::min<int64_t>(kChannels, a.rank - first))};
    for (int r = 0; r < x.rows; ++r)
      finish_row(finish, sums[r], nullptr, t + r * round_up(a.rank, kWidth) + first);
  });
}

// Which part of several an item belongs to: `counts` of them lie one after the other.
struct Item {
  int part;
  int64_t index;
};
inline Item item_of(const int64_t* counts, int64_t i) {
  int part = 0;
  for (; i >= counts[part]; ++part) i -= counts[part];
  return {part, i};
}

// Layers over the same rows: one region, so that small ones need not wait for each other.
template <class T>
void layers(const QuantizedLinear* parts, int count) {
  constexpr int64_t kBlock = kQuads * kChannels, kTiles = kChunk / kTile;
  const QuantizedLinear& first = parts[0];
  bool shifted = false;
  int64_t blocks[kParts], lows[kParts], ranks[kParts + 1] = {}, all = 0, low = 0, work = 0, room = 0;
  for (int p = 0; p < count; ++p) {
    const QuantizedLinear& a = parts[p];
    all += blocks[p] = (a.out + kBlock - 1) / kBlock;
    low += lows[p] = (a.rank + kChannels - 1) / kChannels;
    ranks[p + 1] = ranks[p] + round_up(a.rank, kWidth);
    work += a.rows * a.in * a.out;
    room = std::max(room, Room::floats(a));
    shifted = shifted || a.layout == WeightLayout::int4;
  }
  const int64_t most = std::min(kTiles, (first.rows + kTile - 1) / kTile);
  const int64_t width = tile_floats(first.in), span = most * kTile;
  const int threads = threads_for(std::max(all, low), work >= kGrain);
  Scratch xs(most * width), ts(span * ranks[count]), own(room, threads);
  std::fill_n(ts.data, span * ranks[count], 0.f);
  for (int64_t start = 0; start < first.rows; start += kChunk) {
    const int64_t rows = std::min(kChunk, first.rows - start), tiles = (rows + kTile - 1) / kTile;
    Tile x[kTiles];
    auto low_rows = [&](int p, int64_t tile) {
      const int64_t rank = ranks[p + 1] - ranks[p];
      return Tile{ts.data + span * ranks[p] + tile * kTile * rank, rank, kSlice, x[tile].rows,
                  nullptr, 0};
    };
#pragma omp parallel for num_threads(threads) if (rows * first.in >= kGrain)
    for (int64_t i = 0; i < tiles; ++i)
      x[i] = make_tile(first, start + i * kTile, int(std::min(kTile, rows - i * kTile)), shifted,
                       xs.data + i * width);
#pragma omp parallel for num_threads(threads) if (rows * first.in * ranks[count] >= 8 * kGrain)
    for (int64_t i = 0; i < tiles * low; ++i) {
      const Item item = item_of(lows, i % low);
      const Tile t = low_rows(item.part, i / low);
      project(parts[item.part], x[i / low], item.index * kChannels, own.own(),
              const_cast<float*>(t.data));
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < all; ++block) {
      const Item item = item_of(blocks, block);
      const QuantizedLinear& a = parts[item.part];
      for (int64_t i = 0; i < tiles; ++i)
        layer_block(a, x[i], low_rows(item.part, i), item.index * kBlock, Room(own.own(), a),
                    static_cast<T*>(a.y) + (start + i * kTile) * a.y_stride);
    }
  }
}

// ---- weights that lie as (in, out) ---------------------------------------------------------------

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

}  // namespace

void quantized_linears(const QuantizedLinear* parts, int count) {
  QuantizedLinear rest[kParts];
  int left = 0;
  by_dtype(parts[0].x.dtype, [&](auto element) {
    using T = decltype(element);
    for (int p = 0; p < count; ++p) {
      QuantizedLinear a = parts[p];
      if (a.rows == 0 || a.out == 0) continue;
      if (a.transposed && !a.onto) {
        by_dtype(static_cast<DType>(a.layout), [&](auto stored) {
          transposed_layer<decltype(stored), T>(a);
        });
        a.onto = true;
      }
      if (!a.onto || a.rank) rest[left++] = a;
    }
    if (left) layers<T>(rest, left);
  });
}

void quantized_linear(const QuantizedLinear& a) { quantized_linears(&a, 1); }

}  // namespace fastft::FASTFT_ISA
