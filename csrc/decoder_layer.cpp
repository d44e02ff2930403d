// Registers `decoder_layer` for the CPU.
#include "cpu/decoder_layer.h"

#include <deque>
#include <limits>

#include "quantized_linear_arguments.h"
#include "tensor.h"

namespace fastft {
namespace {

using OptionalTensors = std::vector<OptionalTensor>;

// Small float32 vectors, converted here where a model stores them in another type.
class Vectors {
 public:
  const float* add(const OptionalTensor& t, const char* name, int64_t size, float offset) {
    if (!t) return nullptr;
    check_vector(*t, name, size);
    kept_.push_back(as_float(*t));
    const float* values = static_cast<const float*>(kept_.back().data_ptr());
    if (offset == 0) return values;
    std::vector<float>& shifted = shifted_.emplace_back(values, values + size);
    for (float& value : shifted) value += offset;
    return shifted.data();
  }

 private:
  std::deque<Tensor> kept_;
  std::deque<std::vector<float>> shifted_;
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

void set_cache(DecoderLayer& a, const Tensor& keys, const Tensor& values, int64_t heads) {
  STD_TORCH_CHECK(keys.dim() == 4 && keys.size(0) == a.batch && keys.stride(3) == 1,
                  "keys: expected (", a.batch, ", kv_heads, capacity, head_dim)");
  STD_TORCH_CHECK(values.dim() == 4 && values.stride(3) == 1 && values.size(0) == a.batch &&
                      values.size(1) == keys.size(1) && values.size(2) == keys.size(2) &&
                      values.size(3) == keys.size(3),
                  "values: expected the shape of keys");
  STD_TORCH_CHECK(values.scalar_type() == keys.scalar_type(), "values: expected the dtype of keys");
  a.kv_heads = keys.size(1), a.dim = keys.size(3), a.heads = heads;
  STD_TORCH_CHECK(a.kv_heads > 0 && heads % a.kv_heads == 0, "heads: expected a multiple of ",
                  a.kv_heads);
  a.cache_dtype = dtype_of(keys, "keys");
  a.keys = slots_of(keys), a.values = slots_of(values);
}

// Every slot that will be written or read exists.
void check_rows_fit(DecoderLayer& a, int64_t capacity) {
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
    linear.round_inputs = round_inputs;
    const OptionalTensor& bias = linears[3 * i + 2];
    if (bias) {
      check_vector(*bias, "bias", linear.out);
      linear.bias = {bias->data_ptr(), dtype_of(*bias, "bias"), bias->stride(0)};
    }
  }
}

// The sizes that must follow from each other.
void check_sizes(const DecoderLayer& a) {
  const int in = a.linears == 4 ? 1 : 3, last = a.linears - 1, up = last - in - 1;
  const int64_t attended = a.heads * a.dim, all = attended + 2 * a.kv_heads * a.dim;
  int64_t qkv = 0, wide = 0;
  for (int i = 0; i < in; ++i) qkv += a.linear[i].out;
  for (int i = in + 1; i < last; ++i) wide += a.linear[i].out;
  bool fits = qkv == all && (in == 1 || a.linear[0].out == attended);
  fits = fits && (in == 1 || a.linear[1].out == a.kv_heads * a.dim);
  fits = fits && a.linear[in].in == attended && a.linear[in].out == a.hidden;
  fits = fits && (up == 1 || a.linear[in + 1].out == a.linear[in + 2].out);
  fits = fits && a.linear[last].in * (a.gated ? 2 : 1) == wide && a.linear[last].out == a.hidden;
  for (int i = 0; i < last; ++i) fits = fits && (i == in || a.linear[i].in == a.hidden);
  STD_TORCH_CHECK(fits, "linears: their sizes do not belong together");
}

// adapters: a and b of every linear layer, adapter by adapter.
void set_adapters(std::vector<LayerAdapter>& out, const DecoderLayer& a,
                  const OptionalTensors& adapters, const std::vector<double>& scales) {
  STD_TORCH_CHECK(adapters.size() % (2 * a.linears) == 0 && scales.size() * 2 == adapters.size(),
                  "adapters: expected a and b, and a scale, for each of ", a.linears, " linears");
  out.resize(adapters.size() / (2 * a.linears));
  for (size_t i = 0; i < scales.size(); ++i) {
    LayerAdapter& adapter = out[i / a.linears];
    const int64_t linear = i % a.linears;
    const OptionalTensor &low = adapters[2 * i], &high = adapters[2 * i + 1];
    STD_TORCH_CHECK(low.has_value() == high.has_value(), "adapters: expected both a and b");
    adapter.rank[linear] = low ? low->size(0) : 0;
    if (!low) continue;
    adapter.a[linear] = float_rows(*low, "a", low->size(0), a.linear[linear].in);
    adapter.b[linear] = float_rows(*high, "b", a.linear[linear].out, low->size(0));
    adapter.scale[linear] = float(scales[i]);
  }
}

Tensor decoder_layer(Tensor x, Tensor keys, Tensor values, Tensor cu_seqlens, Tensor lengths,
                     int64_t queries, OptionalTensor cos, OptionalTensor sin, OptionalTensors norms,
                     OptionalTensors linears, OptionalTensors adapters,
                     std::vector<double> adapter_scales, OptionalTensor adapter_of, bool round_inputs,
                     int64_t heads, int64_t activation, bool gated, bool center, double eps,
                     double offset, double scale, int64_t window, double softcap) {
  DecoderLayer a{};
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
                  "x: expected contiguous float32 (tokens, hidden)");
  a.tokens = x.size(0), a.hidden = x.size(1);
  a.x = static_cast<const float*>(x.data_ptr());
  a.queries = queries;
  a.batch = lengths.dim() == 1 ? lengths.size(0) : -1;
  a.lengths = integers(lengths, "lengths", a.batch);
  a.cu_seqlens = integers(cu_seqlens, "cu_seqlens", a.batch + 1);
  set_cache(a, keys, values, heads);
  check_rows_fit(a, keys.size(2));
  a.gated = gated, a.center = center, a.eps = float(eps);
  set_linears(a, linears, round_inputs);
  check_sizes(a);
  STD_TORCH_CHECK(norms.size() == 6, "norms: expected six");
  Vectors vectors;
  auto norm = [&](int i, int64_t size) {
    return NormWeight{vectors.add(norms[i], "norm weight", size, float(offset)), nullptr};
  };
  a.attention_norm = norm(0, a.hidden), a.mlp_norm = norm(2, a.hidden);
  a.attention_norm.bias = vectors.add(norms[1], "norm bias", a.hidden, 0);
  a.mlp_norm.bias = vectors.add(norms[3], "norm bias", a.hidden, 0);
  a.query_norm = norm(4, a.dim), a.key_norm = norm(5, a.dim);
  if (cos) {
    STD_TORCH_CHECK(sin && cos->dim() == 2 && cos->size(1) <= a.dim && cos->size(1) % 2 == 0,
                    "cos, sin: expected (tokens, an even number up to ", a.dim, ")");
    a.half = cos->size(1) / 2;
    a.cos = float_matrix(*cos, "cos", a.tokens, 2 * a.half);
    a.sin = float_matrix(*sin, "sin", a.tokens, 2 * a.half);
  }
  std::vector<LayerAdapter> choices;
  set_adapters(choices, a, adapters, adapter_scales);
  a.adapters = choices.data(), a.adapter_count = int(choices.size());
  if (adapter_of) {
    a.adapter_of = integers(*adapter_of, "adapter_of", a.batch);
    for (int64_t row = 0; row < a.batch; ++row)
      STD_TORCH_CHECK(a.adapter_of[row] >= -1 && a.adapter_of[row] < a.adapter_count,
                      "adapter_of: expected -1 to ", a.adapter_count - 1);
  } else {
    STD_TORCH_CHECK(a.adapter_count <= 1, "adapter_of: expected one per row");
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation: expected 0 to 2");
  a.activation = static_cast<Activation>(activation);
  a.scale = float(scale), a.softcap = float(softcap);
  a.window = window < 0 ? std::numeric_limits<int32_t>::max() : window;
  Tensor out = empty_rows(x, a.tokens, a.hidden);
  a.out = static_cast<float*>(out.data_ptr());
  FASTFT_DISPATCH(decoder_layer(a));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
}

}  // namespace fastft
