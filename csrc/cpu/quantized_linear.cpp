// A linear layer for few rows: the weight is read once for 16 of them, unpacked in registers.
//
// Every result is one vector of sums over the inputs in order, folded at the end, whatever tile it
// was computed in: its bits depend neither on the other rows nor on the number of threads.
#include "quantized_linear.h"

#include <algorithm>

#include "scratch.h"
#include "stored_dot.h"
#include "transposed_linear.h"

namespace fastft::FASTFT_ISA {
namespace {

constexpr int kQuads = 4;        // kChannels outputs each: what a thread takes at a time
constexpr int64_t kBlock = kQuads * kChannels;
constexpr int64_t kChunk = 256;  // rows that are made ready at once
constexpr int64_t kTiles = kChunk / kTile;
static_assert(kTile == kSharedRows);

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

constexpr int64_t shift_floats(int64_t in) { return in / kRun * kWidth; }
// Of a rounded row: a run's bytes, its shifts and its scale.
constexpr int64_t rounded_floats(int64_t in) {
  return runs_of(in) * (kRun / 4 + kRunSums + kScales);
}
constexpr int64_t tile_floats(int64_t in) {
  return kTile * (round_up(in, kSlice) + round_up(shift_floats(in), kWidth) + rounded_floats(in));
}

// Which forms of x the layers' weights are multiplied with, beside floats.
struct Forms {
  bool shifted, rounded;
};

// What several layers over the same rows have in common, the same for every thread.
struct Layers {
  const QuantizedLinear* parts;
  int count;
  const RowSource* source;
  Forms forms{};
  int64_t blocks[kParts], lows[kParts], ranks[kParts + 1] = {};
  int64_t all = 0, low = 0, work = 0, room = 0;  // sums over the parts, and the largest room

  Layers(const QuantizedLinear* parts, int count, const RowSource* source);
  int64_t rows() const { return parts[0].rows; }
  int64_t in() const { return parts[0].in; }
  // A single tile is made by every thread for itself: nobody waits for it.
  bool single() const { return rows() <= kTile; }
  int64_t tiles() const { return std::min(kTiles, (rows() + kTile - 1) / kTile); }
  int64_t own_floats() const { return round_up(in(), 16) + room; }
  int64_t floats(int threads) const {
    return (single() ? threads : tiles()) * tile_floats(in()) + tiles() * kTile * ranks[count] +
           threads * own_floats();
  }
  bool reads_in_place(int tile_rows) const {
    const FloatRows& x = parts[0].x;
    return !source && tile_rows <= kMaxRows && x.dtype == DType::float32 && in() % kWidth == 0;
  }
};

// Where the parts of a tile lie in scratch memory, and of x where it is read in place.
Tile place_tile(const Layers& layers, int64_t row, int rows, float* scratch) {
  const int64_t in = layers.in(), runs = runs_of(in);
  const bool packed = rows > kMaxRows;
  Tile tile{scratch, packed ? kSlice : round_up(in, kSlice), packed ? rows * kSlice : kSlice,
            rows, nullptr, shift_floats(in), {}};
  if (layers.reads_in_place(rows)) {
    const FloatRows& x = layers.parts[0].x;
    tile.data = static_cast<const float*>(x.data) + row * x.stride, tile.stride = x.stride;
  }
  float* shifts = scratch + kTile * round_up(in, kSlice);
  if (layers.forms.shifted && NibbleNumbers::kShift != 0) tile.shifts = shifts;
  if (layers.forms.rounded) {
    float* bytes = shifts + kTile * round_up(shift_floats(in), kWidth);
    float* sums = bytes + rows * runs * kRun / 4;
    tile.rounded = {reinterpret_cast<int8_t*>(bytes), sums + rows * runs * kRunSums,
                    reinterpret_cast<int32_t*>(sums), runs, rows};
  }
  return tile;
}

// Makes row r of a tile, and all forms of it; `whole` holds a row.
void fill_row(const Layers& layers, const Tile& tile, int64_t row, int r, float* whole) {
  const int64_t in = layers.in();
  const bool packed = tile.rows > kMaxRows;
  auto at = [&](int64_t k) {
    return const_cast<float*>(tile.data) + k / kSlice * tile.slice + k % kSlice + r * tile.stride;
  };
  if (layers.source) {
    float* to = packed ? whole : at(0);
    layers.source->fill(layers.source->context, row + r, to);
    std::fill(to + in, to + round_up(in, kWidth), 0.f);
    for (int64_t k = 0; packed && k < in; k += kSlice)
      std::copy_n(to + k, round_up(std::min(kSlice, in - k), kWidth), at(k));
  } else if (!layers.reads_in_place(tile.rows)) {
    for (int64_t k = 0; k < in; k += kSlice)
      to_floats(layers.parts[0].x, row + r, k, std::min(kSlice, in - k), at(k));
  }
  if (layers.forms.rounded) {
    const RoundedTile& x = tile.rounded;
    for (int64_t k = 0; k < in; k += kSlice) {
      const int64_t run = r * x.runs + k / kRun;
      round_row(at(k), std::min(kSlice, in - k), const_cast<int8_t*>(x.bytes) + run * kRun,
                const_cast<float*>(x.scales) + run * kScales,
                const_cast<int32_t*>(x.shifts) + run * kRunSums);
    }
  }
  for (int64_t k = 0; tile.shifts && k + kRun <= in; k += kRun) {
    Vec total{};
    for (int v = 0; v < kRunVecs; ++v) total += load(at(k) + v * kWidth);
    store(const_cast<float*>(tile.shifts) + r * tile.shift_stride + k / kRun * kWidth,
          total * -NibbleNumbers::kShift);
  }
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
Weights weights_at(const QuantizedLinear& a, int64_t first) {
  Weights w;
  point(w.row, a.values, a.values_stride, first, a.out);
  w.ahead = ahead_of(a.values_stride * int64_t(sizeof *w.row[0]));
  if constexpr (Weights::grouped) {
    point(w.scale, a.scale, a.scale_stride, first, a.out);
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

inline Finish finish_at(const QuantizedLinear& a, int64_t first) {
  Finish f{broadcast(1.f), Vec{}, a.rank ? a.lora_scale : 0.f,
           int(std::min<int64_t>(kChannels, a.out - first))};
  for (int c = 0; a.bias.data && c < f.count; ++c) f.bias[c] = float_at(a.bias, first + c);
  if (a.layout != WeightLayout::int8) return f;
  const float* scale = static_cast<const float*>(a.scale) + first * a.scale_stride;
  if (a.scale_stride == 1 && f.count == kChannels) {
    // At once: lane by lane it would take as long as a short row.
    f.scale = Vec{};
    std::memcpy(&f.scale, scale, sizeof(float) * kChannels);
  } else {
    for (int c = 0; c < f.count; ++c) f.scale[c] = scale[c * a.scale_stride];
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
  explicit Room(float* data) : unpacked(data), b(data + kChannels * kSlice) {}
  static int64_t floats(const QuantizedLinear& a) {
    return kChannels * (kSlice + round_up(a.rank, kWidth));
  }
  float* unpacked;  // kChannels slices
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
    Weights w[kQuads];
    for (int q = 0; q < quads; ++q) w[q] = weights_at<Weights>(a, first + q * kChannels);
    if constexpr (std::is_integral_v<std::remove_reference_t<decltype(*w[0].row[0])>>) {
      if (a.round_inputs) sum_rounded_tile(w, quads, x.rounded, a.in, sums);
      else sum_tile(w, quads, x, a.in, room.unpacked, sums);
    } else {
      sum_tile(w, quads, x, a.in, room.unpacked, sums);
    }
  }
  for (int q = 0; q < quads; ++q) {
    const int64_t channel = first + q * kChannels;
    if (a.rank) {
      Plain<float> b{};
      if (a.b.dtype == DType::float32 && a.rank == rank) {
        point(b.row, a.b.data, a.b.stride, channel, a.out);
      } else {
        for (int c = 0; c < kChannels; ++c) {
          b.row[c] = room.b + c * rank;
          to_floats(a.b, std::min(channel + c, a.out - 1), 0, a.rank, room.b + c * rank);
        }
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

Layers::Layers(const QuantizedLinear* parts, int count, const RowSource* source)
    : parts(parts), count(count), source(source) {
  for (int p = 0; p < count; ++p) {
    const QuantizedLinear& a = parts[p];
    all += blocks[p] = (a.out + kBlock - 1) / kBlock;
    low += lows[p] = (a.rank + kChannels - 1) / kChannels;
    ranks[p + 1] = ranks[p] + round_up(a.rank, kWidth);
    work += a.rows * a.in * a.out;
    room = std::max(room, Room::floats(a));
    const bool rounds = a.round_inputs && !a.onto;
    forms.rounded = forms.rounded || rounds;
    forms.shifted = forms.shifted || (!rounds && a.layout == WeightLayout::int4);
  }
}

// kChannels columns of t = x A^T from `first` on, and the zeros behind the last one.
void project(const QuantizedLinear& a, const Tile& x, int64_t first, float* unpacked, float* t) {
  const int64_t stride = round_up(a.rank, kWidth);
  by_dtype(a.a.dtype, [&](auto element) {
    using T = decltype(element);
    Plain<T> w;
    point(w.row, a.a.data, a.a.stride, first, a.rank);
    w.ahead = kChannels * a.a.stride * int64_t(sizeof(T));
    Sums sums;
    sum_tile(&w, 1, x, a.in, unpacked, &sums);
    Finish finish{broadcast(1.f), Vec{}, 0.f, int(std::min<int64_t>(kChannels, a.rank - first))};
    for (int r = 0; r < x.rows; ++r)
      finish_row(finish, sums[r], nullptr, t + r * stride + first);
  });
  for (int r = 0; r < x.rows && first + kChannels >= a.rank; ++r)
    std::fill(t + r * stride + a.rank, t + (r + 1) * stride, 0.f);
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

// Shared by the threads of the region it is called in.
template <class T>
void compute(const Layers& layers, float* xs) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t width = tile_floats(layers.in()), span = layers.tiles() * kTile;
  float* ts = xs + (layers.single() ? threads : layers.tiles()) * width;
  float* whole = ts + span * layers.ranks[layers.count] + thread * layers.own_floats();
  float* own = whole + round_up(layers.in(), 16);
  for (int64_t start = 0; start < layers.rows(); start += kChunk) {
    const int64_t rows = std::min(kChunk, layers.rows() - start), tiles = (rows + kTile - 1) / kTile;
    Tile x[kTiles];
    for (int64_t i = 0; i < tiles; ++i)
      x[i] = place_tile(layers, start + i * kTile, int(std::min(kTile, rows - i * kTile)),
                        xs + (layers.single() ? thread : i) * width);
    if (layers.single()) {
      for (int r = 0; r < rows; ++r) fill_row(layers, x[0], 0, r, whole);
    } else {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row)
        fill_row(layers, x[row / kTile], start + row / kTile * kTile, int(row % kTile), whole);
    }
    auto low_rows = [&](int p, int64_t tile) {
      const int64_t rank = layers.ranks[p + 1] - layers.ranks[p];
      return Tile{ts + span * layers.ranks[p] + tile * kTile * rank, rank, kSlice, x[tile].rows,
                  nullptr, 0, {}};
    };
    if (layers.low) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles * layers.low; ++i) {
        const Item item = item_of(layers.lows, i % layers.low);
        const Tile t = low_rows(item.part, i / layers.low);
        project(layers.parts[item.part], x[i / layers.low], item.index * kChannels, own,
                const_cast<float*>(t.data));
      }
    }
#pragma omp for schedule(guided, 2)
    for (int64_t block = 0; block < layers.all; ++block) {
      const Item item = item_of(layers.blocks, block);
      const QuantizedLinear& a = layers.parts[item.part];
      for (int64_t i = 0; i < tiles; ++i)
        layer_block(a, x[i], low_rows(item.part, i), item.index * kBlock, Room(own),
                    static_cast<T*>(a.y) + (start + i * kTile) * a.y_stride);
    }
  }
}

}  // namespace

int quantized_linears_threads(const QuantizedLinear* parts, int count) {
  const Layers layers(parts, count, nullptr);
  return threads_for(std::max(layers.all, layers.low), layers.work >= kGrain);
}

int64_t quantized_linears_floats(const QuantizedLinear* parts, int count, int threads) {
  int64_t floats = Layers(parts, count, nullptr).floats(threads);
  for (int p = 0; p < count; ++p)
    if (parts[p].transposed) floats = std::max(floats, transposed_floats(parts[p], threads));
  return floats;
}

void shared_quantized_linears(const QuantizedLinear* parts, int count, const RowSource* source,
                              float* room) {
  QuantizedLinear rest[kParts];
  int left = 0;
  by_dtype(parts[0].x.dtype, [&](auto element) {
    using T = decltype(element);
    for (int p = 0; p < count; ++p) {
      QuantizedLinear a = parts[p];
      if (a.rows == 0 || a.out == 0) continue;
      if (a.transposed && !a.onto) {
        by_dtype(static_cast<DType>(a.layout), [&](auto stored) {
          transposed_layer<decltype(stored), T>(a, source, room);
        });
        a.onto = true;
      }
      if (!a.onto || a.rank) rest[left++] = a;
    }
    if (left) compute<T>(Layers(rest, left, source), room);
  });
}

void quantized_linears(const QuantizedLinear* parts, int count) {
  const int threads = quantized_linears_threads(parts, count);
  Scratch room(quantized_linears_floats(parts, count, threads));
#pragma omp parallel num_threads(threads)
  shared_quantized_linears(parts, count, nullptr, room.data);
}

void quantized_linear(const QuantizedLinear& a) { quantized_linears(&a, 1); }

}  // namespace fastft::FASTFT_ISA
