// A decoder layer in one call: the kernels of its operators, one after the other over one scratch.
//
// Each of them gives a token the same bits whatever tokens are computed beside it, so the layer does.
#include "decoder_layer.h"

#include <algorithm>
#include <vector>

#include "decode_attention.h"
#include "norm.h"
#include "quantized_linear.h"
#include "rotary.h"
#include "scratch.h"
#include "vec.h"

namespace fastft::FASTFT_ISA {
namespace {

// Cuts one piece of scratch memory into aligned arrays.
class Arena {
 public:
  static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }
  explicit Arena(float* data) : next_(data) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += padded(floats);
    return taken;
  }

 private:
  float* next_;
};

struct Layer {
  const DecoderLayer& a;
  int in_count, up_count;          // linears that read the attention's and the MLP's input
  int64_t qkv_width, q_width, kv_width, up_width, inner;

  explicit Layer(const DecoderLayer& a) : a(a) {
    in_count = a.linears - (a.gated && a.linears == 7 ? 4 : 3);
    up_count = a.linears - in_count - 2;
    q_width = a.heads * a.dim, kv_width = a.kv_heads * a.dim, qkv_width = q_width + 2 * kv_width;
    up_width = 0;
    for (int i = 0; i < up_count; ++i) up_width += up()[i].out;
    inner = a.gated ? up_width / 2 : up_width;
  }
  const QuantizedLinear* in() const { return a.linear; }
  const QuantizedLinear* up() const { return a.linear + in_count + 1; }

  void norm(const float* x, const float* residual, const NormWeight& w, int64_t rows, int64_t hidden,
            float* total, float* y, float* statistics) const {
    NormForward n{};
    n.dtype = DType::float32, n.rows = rows, n.hidden = hidden;
    n.x = x, n.x_stride = hidden;
    n.residual = residual, n.residual_stride = hidden, n.total = total;
    n.weight = w.weight, n.bias = w.bias, n.eps = a.eps, n.center = a.center;
    n.y = y, n.mean = statistics, n.rstd = statistics + rows;
    norm_forward(n);
  }

  // Linears [first, first + count) of the layer over x, side by side in y; adapters added.
  void linears(int first, int count, const float* x, int64_t width, float* y) const {
    QuantizedLinear parts[kParts];
    int64_t column = 0;
    const int all = uniform_adapter();
    for (int i = 0; i < count; ++i) {
      QuantizedLinear& part = parts[i] = a.linear[first + i];
      part.rows = a.tokens;
      part.x = {x, DType::float32, part.in};
      part.y = y + column, part.y_stride = width;
      column += part.out;
      if (all >= 0) set_adapter(part, all, first + i);
    }
    quantized_linears(parts, count);
    if (all != kMixed) return;
    // Rows beside each other that take the same adapter, which is added to what lies in y.
    for (int64_t row = 0, end; row < a.batch; row = end) {
      for (end = row + 1; end < a.batch && a.adapter_of[end] == a.adapter_of[row];) ++end;
      const int64_t token = a.cu_seqlens[row], tokens = a.cu_seqlens[end] - token;
      if (a.adapter_of[row] < 0 || tokens == 0) continue;
      for (int i = 0; i < count; ++i) {
        QuantizedLinear part = parts[i];
        part.rows = tokens, part.onto = true;
        part.x.data = x + token * part.in;
        part.y = static_cast<float*>(part.y) + token * width;
        set_adapter(part, a.adapter_of[row], first + i);
        if (part.rank) quantized_linear(part);
      }
    }
  }

  void append() const;
  void attend(const float* qkv, float* room, float* out) const;
  void run() const;

 private:
  static constexpr int kMixed = -2;

  // The adapter all rows take, -1 where they take none, kMixed where they differ.
  int uniform_adapter() const {
    if (!a.adapter_of || a.batch == 0) return a.adapter_count == 1 && !a.adapter_of ? 0 : -1;
    for (int64_t row = 1; row < a.batch; ++row)
      if (a.adapter_of[row] != a.adapter_of[0]) return kMixed;
    return a.adapter_of[0];
  }
  void set_adapter(QuantizedLinear& part, int adapter, int linear) const {
    const LayerAdapter& from = a.adapters[adapter];
    part.rank = from.rank[linear];
    part.a = from.a[linear], part.b = from.b[linear], part.lora_scale = from.scale[linear];
  }
};

template <class T>
void append_heads(const DecoderLayer& a, const float* x, int64_t stride, const CacheSlots& cache) {
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t begin = a.cu_seqlens[row], count = a.cu_seqlens[row + 1] - begin;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        const float* from = x + (begin + i) * stride + head * a.dim;
        T* to = static_cast<T*>(cache.data) + row * cache.row_stride + head * cache.head_stride +
                (a.lengths[row] - count + i) * cache.slot_stride;
        for_each_vec(a.dim, [&](int64_t j, auto n) { store(to + j, load(from + j, n), n); });
      }
  }
}

// Attention of all rows at once: where they have fewer tokens than `queries`, they fill the last
// places, and what stands before is computed over fewer slots and left.
void Layer::attend(const float* qkv, float* room, float* out) const {
  const int64_t places = a.batch * a.queries;
  const bool even = places == a.tokens;
  Arena arena(room);
  float* q = arena.take(even ? 0 : places * q_width);
  float* result = even ? out : arena.take(places * q_width);
  std::vector<int32_t> seen(a.batch);
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t begin = a.cu_seqlens[row], count = a.cu_seqlens[row + 1] - begin;
    seen[row] = count ? a.lengths[row] : 0;
    if (even) continue;
    float* to = q + row * a.queries * q_width;
    std::fill_n(to, (a.queries - count) * q_width, 0.f);
    to += (a.queries - count) * q_width;
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(qkv + (begin + i) * qkv_width, q_width, to + i * q_width);
  }
  DecodeAttention d{};
  d.dtype = a.cache_dtype, d.query_dtype = DType::float32;
  d.batch = a.batch, d.queries = a.queries, d.heads = a.heads, d.kv_heads = a.kv_heads;
  d.dim = a.dim, d.lengths = seen.data();
  const int64_t token = even ? qkv_width : q_width;
  d.q = {even ? qkv : q, a.queries * token, token, a.dim};
  d.k = {a.keys.data, a.keys.row_stride, a.keys.slot_stride, a.keys.head_stride};
  d.v = {a.values.data, a.values.row_stride, a.values.slot_stride, a.values.head_stride};
  d.scale = a.scale, d.window = a.window, d.softcap = a.softcap;
  d.out = result;
  decode_attention(d);
  if (even) return;
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t begin = a.cu_seqlens[row], count = a.cu_seqlens[row + 1] - begin;
    std::copy_n(result + (row + 1) * a.queries * q_width - count * q_width, count * q_width,
                out + begin * q_width);
  }
}

void Layer::run() const {
  const int64_t n = a.tokens, places = a.batch * a.queries;
  const int64_t normed = n * std::max(a.hidden, q_width), wide = n * std::max(qkv_width, up_width);
  const int64_t statistics = 2 * n * std::max(a.heads, a.kv_heads) + 2 * n;
  Scratch scratch(Arena::padded(normed) + Arena::padded(wide) + Arena::padded(n * inner) +
                  2 * Arena::padded(n * a.hidden) + Arena::padded(statistics) +
                  2 * Arena::padded(places * q_width));
  Arena arena(scratch.data);
  float *h = arena.take(normed), *y = arena.take(wide), *inside = arena.take(n * inner);
  float *branch = arena.take(n * a.hidden), *total = arena.take(n * a.hidden);
  float *stats = arena.take(statistics), *room = arena.take(2 * Arena::padded(places * q_width));

  norm(a.x, nullptr, a.attention_norm, n, a.hidden, nullptr, h, stats);
  linears(0, in_count, h, qkv_width, y);
  for (int64_t token = 0; token < n; ++token) {
    float* row = y + token * qkv_width;
    if (a.query_norm.weight) norm(row, nullptr, a.query_norm, a.heads, a.dim, nullptr, row, stats);
    row += q_width;
    if (a.key_norm.weight) norm(row, nullptr, a.key_norm, a.kv_heads, a.dim, nullptr, row, stats);
  }
  if (a.cos) {
    Rotary r{};
    r.dtype = r.angle_dtype = DType::float32;
    r.batch = 1, r.tokens = n, r.head_dim = a.dim, r.half = a.half, r.count = 2;
    r.parts[0] = {a.heads, y, 0, qkv_width, a.dim, y, 0, qkv_width, a.dim};
    r.parts[1] = {a.kv_heads, y + q_width, 0, qkv_width, a.dim, y + q_width, 0, qkv_width, a.dim};
    r.cos = a.cos, r.sin = a.sin, r.cos_token = r.sin_token = 2 * a.half;
    rotary(r);
  }
  by_dtype(a.cache_dtype, [&](auto element) {
    using T = decltype(element);
    append_heads<T>(a, y + q_width, qkv_width, a.keys);
    append_heads<T>(a, y + q_width + kv_width, qkv_width, a.values);
  });
  attend(y, room, h);
  linears(in_count, 1, h, a.hidden, branch);
  norm(branch, a.x, a.mlp_norm, n, a.hidden, total, h, stats);
  linears(in_count + 1, up_count, h, up_width, y);
  GatedForward g{};
  g.dtype = DType::float32, g.activation = a.activation;
  g.rows = n, g.columns = inner, g.h = inside;
  g.gate = y, g.gate_stride = up_width;
  g.up = a.gated ? y + inner : nullptr, g.up_stride = up_width;
  gated_forward(g);
  linears(a.linears - 1, 1, inside, a.hidden, branch);
  for_each_vec(n * a.hidden, [&](int64_t i, auto count) {
    store(a.out + i, load(total + i, count) + load(branch + i, count), count);
  });
}

}  // namespace

void decoder_layer(const DecoderLayer& a) {
  if (a.tokens) Layer(a).run();
}

}  // namespace fastft::FASTFT_ISA
