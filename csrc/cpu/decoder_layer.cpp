// Decoder layers in one parallel region, over one scratch: its threads share each product and the
// attention, and make the rows that a product reads each for itself where there are few of them.
//
// Each kernel gives a token the same bits whatever tokens are computed beside it, so the layers do.
#include "decoder_layer.h"

#include <algorithm>
#include <vector>

#include "decode_attention.h"
#include "norm.h"
#include "quantized_linear.h"
#include "rotary.h"
#include "scratch.h"
#include "tile.h"

namespace fastft::FASTFT_ISA {
namespace {

// Cuts one piece of scratch memory into aligned arrays; without memory it counts.
struct Arena {
  float* data;
  int64_t size = 0;
  float* take(int64_t floats) {
    float* taken = data ? data + size : nullptr;
    size += round_up(floats, 16);
    return taken;
  }
};

// The widths of a layer's parts.
struct Widths {
  int in_count, up_count;  // linears that read the attention's and the MLP's input
  int64_t q, kv, qkv, up = 0, inner;
  Widths(const DecoderLayer& a, const DecoderStep& step)
      : in_count(a.linears - (a.gated && a.linears == 7 ? 4 : 3)),
        up_count(a.linears - in_count - 2), q(a.heads * step.dim), kv(step.kv_heads * step.dim),
        qkv(q + 2 * kv) {
    for (int i = 0; i < up_count; ++i) up += a.linear[in_count + 1 + i].out;
    inner = a.gated ? up / 2 : up;
  }
};

// Linears of the layer that share their rows; x is one tensor, or made by a source.
struct Group {
  QuantizedLinear parts[kParts];
  int first, count;
};

// The memory of a step, as one of its threads sees it.
struct Buffers {
  float* y;          // (tokens, widest of a layer): q, k, v, then gate and up
  float* branch;     // (tokens, hidden): what is added to the residual stream next
  float* queries;    // (batch, queries, q) where rows have different numbers of tokens
  float* attended;   // the same, of the attention's result
  float* room;       // of the operators
  float* totals[2];  // (tokens, hidden), in turns: the residual stream
  float* scratch;    // of a row, each thread's own
  int64_t size;
};

class Step {
 public:
  Step(const DecoderLayer* const* layers, const LayerCache* caches, int count, const DecoderStep& a);
  void run() const;

 private:
  static constexpr int kMixed = -2;

  // Few tokens: every thread keeps the residual stream of all of them.
  bool few() const { return a.tokens <= kSharedRows; }
  bool even() const { return a.batch * a.queries == a.tokens; }
  Buffers buffers(float* data, int thread) const;
  Group group(const DecoderLayer& layer, int first, int count, float* y, int64_t width) const;
  DecodeAttention attention(const DecoderLayer& layer, const LayerCache& cache, const Buffers& b,
                            const Widths& w) const;
  void compute(const DecoderLayer& layer, const LayerCache& cache, const Buffers& b,
               const float*& carried, bool first) const;
  void add(const DecoderLayer& layer, const Group& group, const RowSource* source, float* room) const;
  void place(const DecoderLayer& layer, const LayerCache& cache, const Widths& w, int64_t token,
             float* qkv, float* queries, float* scratch) const;
  int uniform_adapter(const DecoderLayer& layer) const;

  const DecoderLayer* const* layers;
  const LayerCache* caches;
  int count;
  const DecoderStep& a;
  std::vector<int32_t> row_of, seen;  // of every token; of every row
  int threads = 1;
  int64_t room = 0, y = 0, attended = 0, widest = 0;  // the most that a layer needs
};

// The adapter all rows take, -1 where they take none, kMixed where they differ.
int Step::uniform_adapter(const DecoderLayer& layer) const {
  if (!a.adapter_of || a.batch == 0) return layer.adapter_count == 1 && !a.adapter_of ? 0 : -1;
  for (int64_t row = 1; row < a.batch; ++row)
    if (a.adapter_of[row] != a.adapter_of[0]) return kMixed;
  return a.adapter_of[0];
}

void set_adapter(QuantizedLinear& part, const LayerAdapter& from, int linear) {
  part.rank = from.rank[linear];
  part.a = from.a[linear], part.b = from.b[linear], part.lora_scale = from.scale[linear];
}

// Linears [first, first + count) of the layer, their results side by side in y.
Group Step::group(const DecoderLayer& layer, int first, int count, float* y, int64_t width) const {
  Group g{{}, first, count};
  const int all = uniform_adapter(layer);
  for (int i = 0; i < count; ++i) {
    QuantizedLinear& part = g.parts[i] = layer.linear[first + i];
    part.rows = a.tokens;
    part.x = {nullptr, DType::float32, part.in};
    part.y = y, part.y_stride = width;
    if (y) y += part.out;
    if (all >= 0) set_adapter(part, layer.adapters[all], first + i);
  }
  return g;
}

Step::Step(const DecoderLayer* const* layers, const LayerCache* caches, int count,
           const DecoderStep& a)
    : layers(layers), caches(caches), count(count), a(a), row_of(a.tokens), seen(a.batch) {
  for (int64_t row = 0; row < a.batch; ++row) {
    std::fill(row_of.begin() + a.cu_seqlens[row], row_of.begin() + a.cu_seqlens[row + 1], row);
    seen[row] = a.cu_seqlens[row + 1] > a.cu_seqlens[row] ? a.lengths[row] : 0;
  }
  auto for_each_group = [&](const DecoderLayer& layer, auto&& body) {
    const Widths w(layer, a);
    for (auto [first, size] : {std::pair{0, w.in_count}, {w.in_count, 1},
                               {w.in_count + 1, w.up_count}, {layer.linears - 1, 1}})
      body(group(layer, first, size, nullptr, 0));
  };
  for (int i = 0; i < count; ++i)
    for_each_group(*layers[i], [&](const Group& g) {
      threads = std::max(threads, quantized_linears_threads(g.parts, g.count));
    });
  for (int i = 0; i < count; ++i) {
    const DecoderLayer& layer = *layers[i];
    const Widths w(layer, a);
    y = std::max(y, std::max(w.qkv, w.up)), attended = std::max(attended, w.q);
    widest = std::max({widest, layer.hidden, w.inner, w.q});
    for_each_group(layer, [&](Group g) {
      // Rows with adapters of their own: one is added at a time.
      for (int j = 0; j < g.count; ++j)
        for (int k = 0; k < layer.adapter_count; ++k)
          g.parts[j].rank = std::max(g.parts[j].rank, layer.adapters[k].rank[g.first + j]);
      room = std::max(room, quantized_linears_floats(g.parts, g.count, threads));
    });
    room = std::max(room, decode_attention_floats(attention(layer, caches[i], {}, w), threads));
  }
}

Buffers Step::buffers(float* data, int thread) const {
  Arena arena{data};
  const int64_t stream = a.tokens * a.hidden, places = a.batch * a.queries;
  Buffers b{};
  b.y = arena.take(a.tokens * y), b.branch = arena.take(stream), b.room = arena.take(room);
  b.queries = arena.take(even() ? 0 : places * attended), b.attended = arena.take(places * attended);
  if (!few()) b.totals[0] = arena.take(stream), b.totals[1] = arena.take(stream);
  arena.size += thread * (round_up(widest, 16) + (few() ? 2 * round_up(stream, 16) : 0));
  b.size = arena.size;
  if (few()) b.totals[0] = arena.take(stream), b.totals[1] = arena.take(stream);
  b.scratch = arena.take(widest);
  return b;
}

DecodeAttention Step::attention(const DecoderLayer& layer, const LayerCache& cache, const Buffers& b,
                                const Widths& w) const {
  DecodeAttention d{};
  d.dtype = a.cache_dtype, d.query_dtype = DType::float32;
  d.batch = a.batch, d.queries = a.queries, d.heads = layer.heads, d.kv_heads = a.kv_heads;
  d.dim = a.dim, d.lengths = seen.data();
  const int64_t token = even() ? w.qkv : w.q;
  d.q = {even() ? b.y : b.queries, a.queries * token, token, a.dim};
  d.k = {cache.keys.data, cache.keys.row_stride, cache.keys.slot_stride, cache.keys.head_stride};
  d.v = {cache.values.data, cache.values.row_stride, cache.values.slot_stride,
         cache.values.head_stride};
  d.scale = layer.scale, d.window = layer.window, d.softcap = layer.softcap;
  d.out = b.attended;
  return d;
}

// Rows that products read. `again` gives the same ones, and keeps nothing.

// x + residual, or x alone, normalised; the sum is kept.
struct NormRows {
  const DecoderLayer& layer;
  NormWeight w;
  const float* x;
  const float* residual;  // or null
  float *total, *scratch;
  NormRows again() const { return {layer, w, residual ? total : x, nullptr, nullptr, scratch}; }
  static void fill(const void* context, int64_t row, float* out) {
    const NormRows& s = *static_cast<const NormRows*>(context);
    const int64_t at = row * s.layer.hidden;
    float statistics[2];
    NormForward n{};
    n.dtype = DType::float32, n.rows = 1, n.hidden = s.layer.hidden, n.x = s.x + at;
    if (s.residual) n.residual = s.residual + at, n.total = s.total + at;
    n.weight = s.w.weight, n.bias = s.w.bias, n.eps = s.layer.eps, n.center = s.layer.center;
    n.y = out, n.mean = statistics, n.rstd = statistics + 1;
    norm_forward_row(n, 0, s.scratch);
  }
};

// act(gate) * up, or act(up).
struct GatedRows {
  GatedForward g;
  GatedRows again() const { return *this; }
  static void fill(const void* context, int64_t row, float* out) {
    GatedForward g = static_cast<const GatedRows*>(context)->g;
    g.h = out - row * g.columns;
    gated_forward_row(g, row);
  }
};

// The attention's result, from the places where it lies.
struct AttendedRows {
  const DecoderStep& a;
  const int32_t* row_of;
  const float* data;
  int64_t width;
  AttendedRows again() const { return *this; }
  // Where they have fewer tokens than `queries`, rows fill the last places.
  int64_t place(int64_t token) const {
    const int32_t row = row_of[token];
    return (row + 1) * a.queries - (a.cu_seqlens[row + 1] - token);
  }
  static void fill(const void* context, int64_t token, float* out) {
    const AttendedRows& s = *static_cast<const AttendedRows*>(context);
    std::copy_n(s.data + s.place(token) * s.width, s.width, out);
  }
};

// Adds to what lies in y the adapters of rows that differ in theirs.
void Step::add(const DecoderLayer& layer, const Group& group, const RowSource* source,
               float* room) const {
  struct From {
    const RowSource* source;
    int64_t first;
    static void fill(const void* context, int64_t row, float* out) {
      const From& s = *static_cast<const From*>(context);
      s.source->fill(s.source->context, s.first + row, out);
    }
  };
  // Rows beside each other that take the same adapter.
  for (int64_t row = 0, end; row < a.batch; row = end) {
    for (end = row + 1; end < a.batch && a.adapter_of[end] == a.adapter_of[row];) ++end;
    const From from{source, a.cu_seqlens[row]};
    const int64_t tokens = a.cu_seqlens[end] - from.first;
    if (a.adapter_of[row] < 0 || tokens == 0) continue;
    for (int i = 0; i < group.count; ++i) {
      QuantizedLinear part = group.parts[i];
      part.rows = tokens, part.onto = true;
      part.y = static_cast<float*>(part.y) + from.first * part.y_stride;
      set_adapter(part, layer.adapters[a.adapter_of[row]], group.first + i);
      const RowSource shifted{From::fill, &from};
      if (part.rank) shared_quantized_linears(&part, 1, &shifted, room);
    }
  }
}

// Norms of the heads, rotation and cache of one token.
void Step::place(const DecoderLayer& layer, const LayerCache& cache, const Widths& w, int64_t token,
                 float* qkv, float* queries, float* scratch) const {
  auto norm_heads = [&](float* x, int64_t heads, const NormWeight& weight) {
    if (!weight.weight) return;
    float statistics[2];
    NormForward n{};
    n.dtype = DType::float32, n.rows = 1, n.hidden = a.dim;
    n.weight = weight.weight, n.eps = layer.eps, n.center = layer.center;
    n.mean = statistics, n.rstd = statistics + 1;
    for (int64_t head = 0; head < heads; ++head) {
      n.x = n.y = x + head * a.dim;
      norm_forward_row(n, 0, scratch);
    }
  };
  float *q = qkv + token * w.qkv, *k = q + w.q, *v = k + w.kv;
  norm_heads(q, layer.heads, layer.query_norm);
  norm_heads(k, a.kv_heads, layer.key_norm);
  if (a.cos) {
    Rotary r{};
    r.dtype = r.angle_dtype = DType::float32;
    r.batch = r.tokens = 1, r.head_dim = a.dim, r.half = a.half, r.count = 2;
    r.parts[0] = {layer.heads, q, 0, 0, a.dim, q, 0, 0, a.dim};
    r.parts[1] = {a.kv_heads, k, 0, 0, a.dim, k, 0, 0, a.dim};
    r.cos = a.cos + token * 2 * a.half, r.sin = a.sin + token * 2 * a.half;
    rotary_row(r, 0);
  }
  const int32_t row = row_of[token];
  const int64_t slot = a.lengths[row] - (a.cu_seqlens[row + 1] - token);
  by_dtype(a.cache_dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      auto append = [&](const CacheSlots& to, const float* from) {
        T* out = static_cast<T*>(to.data) + row * to.row_stride + head * to.head_stride +
                 slot * to.slot_stride;
        for_each_vec(a.dim, [&](int64_t i, auto n) {
          store(out + i, load(from + head * a.dim + i, n), n);
        });
      };
      append(cache.keys, k), append(cache.values, v);
    }
  });
  const AttendedRows places{a, row_of.data(), nullptr, w.q};
  if (!even()) std::copy_n(q, w.q, queries + places.place(token) * w.q);
}

// One layer: its input is carried, and branch where it is not the first; so is its output after it.
void Step::compute(const DecoderLayer& layer, const LayerCache& cache, const Buffers& b,
                   const float*& carried, bool first) const {
  const Widths w(layer, a);
  const bool mixed = uniform_adapter(layer) == kMixed;
  auto apply = [&](int index, int size, auto&& rows, float* y, int64_t width) {
    const RowSource source{rows.fill, &rows};
    const Group g = group(layer, index, size, y, width);
    shared_quantized_linears(g.parts, g.count, &source, b.room);
    if (!mixed) return;
    const auto again = rows.again();
    const RowSource same{again.fill, &again};
    add(layer, g, &same, b.room);
  };
  auto normed = [&](const NormWeight& weight, bool sum, float* total) {
    const NormRows rows{layer, weight, sum ? b.branch : carried, sum ? carried : nullptr, total,
                        b.scratch};
    if (sum) carried = total;
    return rows;
  };
  apply(0, w.in_count, normed(layer.attention_norm, !first, b.totals[0]), b.y, w.qkv);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < a.tokens; ++token)
    place(layer, cache, w, token, b.y, b.queries, b.scratch);
  shared_decode_attention(attention(layer, cache, b, w), b.room);
  apply(w.in_count, 1, AttendedRows{a, row_of.data(), b.attended, w.q}, b.branch, a.hidden);
  apply(w.in_count + 1, w.up_count, normed(layer.mlp_norm, true, b.totals[1]), b.y, w.up);
  GatedRows gated{};
  gated.g.dtype = DType::float32, gated.g.activation = layer.activation;
  gated.g.rows = 1, gated.g.columns = w.inner;
  gated.g.gate = b.y, gated.g.up = layer.gated ? b.y + w.inner : nullptr;
  gated.g.gate_stride = gated.g.up_stride = w.up;
  apply(layer.linears - 1, 1, gated, b.branch, a.hidden);
}

void Step::run() const {
  const int64_t stream = a.tokens * a.hidden;
  Scratch memory(buffers(nullptr, threads).size);
  if (!even()) {
    const Buffers b = buffers(memory.data, 0);
    std::fill_n(b.queries, a.batch * a.queries * attended, 0.f);
  }
#pragma omp parallel num_threads(threads)
  {
    const Buffers b = buffers(memory.data, omp_get_thread_num());
    const float* carried = a.x;
    for (int i = 0; i < count; ++i) compute(*layers[i], caches[i], b, carried, i == 0);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < stream; i += kWidth)
      if (const int64_t left = stream - i; left >= kWidth)
        store(a.out + i, load(carried + i) + load(b.branch + i));
      else
        store(a.out + i, load(carried + i, left) + load(b.branch + i, left), left);
  }
}

}  // namespace

void decoder_layers(const DecoderLayer* const* layers, const LayerCache* caches, int count,
                    const DecoderStep& a) {
  if (a.tokens) Step(layers, caches, count, a).run();
}

}  // namespace fastft::FASTFT_ISA
