// Registers `decoder_layer`, and several of them as one call, for the CPU.
#include "cpu/decoder_layer.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

#include "quantized_linear_arguments.h"
#include "tensor.h"

namespace fastft {
namespace {

using OptionalTensors = std::vector<OptionalTensor>;

// A layer as the kernels take it, in one piece of memory: this, its adapters, its norms' floats. The
// weights stay where they are; whoever holds a plan holds them.
struct Plan {
  static constexpr int64_t kMagic = 0x6661737466740002;
  int64_t magic, size;
  DecoderLayer layer;
  LayerAdapter* adapters() { return reinterpret_cast<LayerAdapter*>(this + 1); }
  float* floats() { return reinterpret_cast<float*>(adapters() + layer.adapter_count); }
};

// Small vectors, converted to float32 where a model stores them in another type.
class Vectors {
 public:
  explicit Vectors(float* to) : next_(to) {}
  const float* add(const OptionalTensor& t, const char* name, float offset) {
    if (!t) return nullptr;
    check_vector(*t, name, t->numel());
    const Tensor values = as_float(*t);
    const float* from = static_cast<const float*>(values.data_ptr());
    float* taken = next_;
    for (int64_t i = 0; i < t->numel(); ++i) *next_++ = from[i] + offset;
    return taken;
  }

 private:
  float* next_;
};

const int32_t* integers(const Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, size);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous(), name,
                  ": expected contiguous int32");
  return static_cast<const int32_t*>(t.data_ptr());
}

const float* float_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_rows(t, name, rows, columns);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  ": expected contiguous float32");
  return static_cast<const float*>(t.data_ptr());
}

CacheSlots slots_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

LayerCache cache_of(const DecoderStep& a, const Tensor& keys, const Tensor& values) {
  STD_TORCH_CHECK(keys.dim() == 4 && keys.size(0) == a.batch && keys.stride(3) == 1,
                  "keys: expected (", a.batch, ", kv_heads, capacity, head_dim)");
  STD_TORCH_CHECK(values.dim() == 4 && values.stride(3) == 1 && values.size(0) == a.batch &&
                      values.size(1) == keys.size(1) && values.size(2) == keys.size(2) &&
                      values.size(3) == keys.size(3),
                  "values: expected the shape of keys");
  STD_TORCH_CHECK(values.scalar_type() == keys.scalar_type(), "values: expected the dtype of keys");
  return {slots_of(keys), slots_of(values)};
}

// Every slot that will be written or read exists.
void check_rows_fit(const DecoderStep& a, int64_t capacity) {
  STD_TORCH_CHECK(a.cu_seqlens[0] == 0 && a.cu_seqlens[a.batch] == a.tokens,
                  "cu_seqlens: expected 0 to ", a.tokens);
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t count = a.cu_seqlens[row + 1] - a.cu_seqlens[row];
    STD_TORCH_CHECK(count >= 0 && count <= a.lengths[row] && a.lengths[row] <= capacity,
                    "lengths: expected ", count, " to the capacity of ", capacity, ", got ",
                    a.lengths[row]);
    STD_TORCH_CHECK(count <= a.queries, "queries: expected at least ", count);
  }
}

void set_linears(DecoderLayer& a, const OptionalTensors& linears, bool round_inputs) {
  a.linears = int(linears.size() / 3);
  STD_TORCH_CHECK(linears.size() % 3 == 0 && a.linears <= kMaxLinears &&
                      (a.linears == 4 || a.linears == 6 || (a.linears == 7 && a.gated)),
                  "linears: expected weight, scale and bias of 4, 6 or 7 linear layers");
  for (int i = 0; i < a.linears; ++i) {
    QuantizedLinear& linear = a.linear[i];
    STD_TORCH_CHECK(linears[3 * i], "linears: expected a weight in each");
    set_weight(linear, *linears[3 * i], linears[3 * i + 1]);
    linear.round_inputs = round_inputs && linears[3 * i + 1].has_value();
    const OptionalTensor& bias = linears[3 * i + 2];
    if (bias) {
      check_vector(*bias, "bias", linear.out);
      linear.bias = {bias->data_ptr(), dtype_of(*bias, "bias"), bias->stride(0)};
    }
  }
}

// The sizes that must follow from each other.
void check_sizes(const DecoderLayer& a, const DecoderStep& step) {
  STD_TORCH_CHECK(step.kv_heads > 0 && a.heads % step.kv_heads == 0,
                  "heads: expected a multiple of ", step.kv_heads);
  STD_TORCH_CHECK(a.hidden == step.hidden, "x: expected a hidden size of ", a.hidden);
  STD_TORCH_CHECK(step.adapter_of || a.adapter_count <= 1, "adapter_of: expected one per row");
  for (int64_t row = 0; step.adapter_of && row < step.batch; ++row)
    STD_TORCH_CHECK(step.adapter_of[row] >= -1 && step.adapter_of[row] < a.adapter_count,
                    "adapter_of: expected -1 to ", a.adapter_count - 1);
  const int in = a.linears == 4 ? 1 : 3, last = a.linears - 1, up = last - in - 1;
  const int64_t attended = a.heads * step.dim, kv = step.kv_heads * step.dim;
  int64_t qkv = 0, wide = 0;
  for (int i = 0; i < in; ++i) qkv += a.linear[i].out;
  for (int i = in + 1; i < last; ++i) wide += a.linear[i].out;
  bool fits = qkv == attended + 2 * kv && (in == 1 || a.linear[0].out == attended);
  fits = fits && (in == 1 || a.linear[1].out == kv);
  fits = fits && a.linear[in].in == attended && a.linear[in].out == a.hidden;
  fits = fits && (up == 1 || a.linear[in + 1].out == a.linear[in + 2].out);
  fits = fits && a.linear[last].in * (a.gated ? 2 : 1) == wide && a.linear[last].out == a.hidden;
  for (int i = 0; i < last; ++i) fits = fits && (i == in || a.linear[i].in == a.hidden);
  STD_TORCH_CHECK(fits, "linears: their sizes do not belong together");
}

// adapters: a and b of every linear layer, adapter by adapter.
void set_adapters(LayerAdapter* out, const DecoderLayer& a, const OptionalTensors& adapters,
                  const std::vector<double>& scales) {
  for (size_t i = 0; i < scales.size(); ++i) {
    LayerAdapter& adapter = out[i / a.linears];
    const int64_t linear = i % a.linears;
    const OptionalTensor &low = adapters[2 * i], &high = adapters[2 * i + 1];
    STD_TORCH_CHECK(low.has_value() == high.has_value(), "adapters: expected both a and b");
    if (!low) continue;
    adapter.rank[linear] = low->size(0);
    adapter.a[linear] = float_rows(*low, "a", low->size(0), a.linear[linear].in);
    adapter.b[linear] = float_rows(*high, "b", a.linear[linear].out, low->size(0));
    adapter.scale[linear] = float(scales[i]);
  }
}

Tensor decoder_plan(OptionalTensors linears, OptionalTensors norms, OptionalTensors adapters,
                    std::vector<double> adapter_scales, bool round_inputs, int64_t heads,
                    int64_t activation, bool gated, bool center, double eps, double offset,
                    double scale, int64_t window, double softcap) {
  DecoderLayer a{};
  a.heads = heads, a.gated = gated, a.center = center, a.eps = float(eps);
  a.scale = float(scale), a.softcap = float(softcap);
  a.window = window < 0 ? std::numeric_limits<int32_t>::max() : window;
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: expected 0 to 2");
  a.activation = static_cast<Activation>(activation);
  set_linears(a, linears, round_inputs);
  a.hidden = a.linear[0].in;
  STD_TORCH_CHECK(adapters.size() % (2 * a.linears) == 0 &&
                      adapter_scales.size() * 2 == adapters.size(),
                  "adapters: expected a and b, and a scale, for each of ", a.linears, " linears");
  a.adapter_count = int(adapters.size() / (2 * a.linears));
  STD_TORCH_CHECK(norms.size() == 6, "norms: expected six");
  int64_t floats = 0;
  for (const OptionalTensor& norm : norms) floats += norm ? norm->numel() : 0;
  const int64_t size = sizeof(Plan) + a.adapter_count * sizeof(LayerAdapter) + floats * 4;
  Tensor out = torch::stable::new_empty(*linears[0], {size}, ScalarType::Byte);
  Plan& plan = *new (out.data_ptr()) Plan{Plan::kMagic, size, a};
  std::uninitialized_value_construct_n(plan.adapters(), a.adapter_count);
  set_adapters(plan.adapters(), a, adapters, adapter_scales);
  Vectors vectors(plan.floats());
  auto add = [&](int i, int64_t size, float offset) {
    if (norms[i]) check_vector(*norms[i], "norms", size);
    return vectors.add(norms[i], "norms", offset);
  };
  DecoderLayer& layer = plan.layer;
  layer.adapters = plan.adapters();
  layer.attention_norm = {add(0, a.hidden, float(offset)), add(1, a.hidden, 0)};
  layer.mlp_norm = {add(2, a.hidden, float(offset)), add(3, a.hidden, 0)};
  const int64_t dim = a.linear[a.linears == 4 ? 1 : 3].in / std::max<int64_t>(heads, 1);
  layer.query_norm.weight = add(4, dim, float(offset));
  layer.key_norm.weight = add(5, dim, float(offset));
  return out;
}

Tensor decoder_layers(Tensor x, std::vector<Tensor> keys, std::vector<Tensor> values,
                      Tensor cu_seqlens, Tensor lengths, int64_t queries, OptionalTensor cos,
                      OptionalTensor sin, OptionalTensor adapter_of, std::vector<Tensor> plans) {
  DecoderStep a{};
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "x: expected contiguous float32 (tokens, hidden)");
  STD_TORCH_CHECK(!plans.empty() && keys.size() == plans.size() && values.size() == plans.size(),
                  "keys, values: expected one for each of ", plans.size(), " layers, at least one");
  a.tokens = x.size(0), a.hidden = x.size(1);
  a.x = static_cast<const float*>(x.data_ptr());
  a.queries = queries;
  a.batch = lengths.dim() == 1 ? lengths.size(0) : -1;
  a.lengths = integers(lengths, "lengths", a.batch);
  a.cu_seqlens = integers(cu_seqlens, "cu_seqlens", a.batch + 1);
  if (adapter_of) a.adapter_of = integers(*adapter_of, "adapter_of", a.batch);
  std::vector<LayerCache> caches;
  for (size_t i = 0; i < plans.size(); ++i) {
    caches.push_back(cache_of(a, keys[i], values[i]));
    STD_TORCH_CHECK(keys[i].size(1) == keys[0].size(1) && keys[i].size(3) == keys[0].size(3) &&
                        keys[i].scalar_type() == keys[0].scalar_type(),
                    "keys: expected the heads and the dtype of the first layer's");
    check_rows_fit(a, keys[i].size(2));
  }
  a.kv_heads = keys[0].size(1), a.dim = keys[0].size(3);
  a.cache_dtype = dtype_of(keys[0], "keys");
  if (cos) {
    STD_TORCH_CHECK(sin && cos->dim() == 2 && cos->size(1) <= a.dim && cos->size(1) % 2 == 0,
                    "cos, sin: expected (tokens, an even number up to ", a.dim, ")");
    a.half = cos->size(1) / 2;
    a.cos = float_matrix(*cos, "cos", a.tokens, 2 * a.half);
    a.sin = float_matrix(*sin, "sin", a.tokens, 2 * a.half);
  }
  std::vector<const DecoderLayer*> layers;
  for (const Tensor& t : plans) {
    Plan* plan = static_cast<Plan*>(t.data_ptr());
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Byte && t.numel() >= int64_t(sizeof(Plan)) &&
                        plan->magic == Plan::kMagic && plan->size == t.numel() &&
                        plan->layer.adapters == plan->adapters(),
                    "plans: expected what decoder_plan gave");
    check_sizes(plan->layer, a);
    layers.push_back(&plan->layer);
  }
  Tensor out = empty_rows(x, a.tokens, a.hidden);
  a.out = static_cast<float*>(out.data_ptr());
  FASTFT_DISPATCH(decoder_layers(layers.data(), caches.data(), int(layers.size()), a));
  return out;
}

Tensor decoder_layer(Tensor x, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor lengths,
                     int64_t queries, OptionalTensor cos, OptionalTensor sin, OptionalTensors norms,
                     OptionalTensors linears, OptionalTensors adapters,
                     std::vector<double> adapter_scales, OptionalTensor adapter_of, bool round_inputs,
                     int64_t heads, int64_t activation, bool gated, bool center, double eps,
                     double offset, double scale, int64_t window, double softcap) {
  const Tensor plan = decoder_plan(linears, norms, adapters, adapter_scales, round_inputs, heads,
                                   activation, gated, center, eps, offset, scale, window, softcap);
  return decoder_layers(x, {keys}, {values}, cu_seqlens, lengths, queries, cos, sin, adapter_of,
                        {plan});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
  m.impl("decoder_layers", TORCH_BOX(&decoder_layers));
  m.impl("decoder_plan", TORCH_BOX(&decoder_plan));
}

}  // namespace fastft
