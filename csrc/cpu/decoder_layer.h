// Decoder layers of a language model over a KV cache, for a few new tokens. Torch-free.
#pragma once

#include "../quantized_linear.h"
#include "gated_mlp.h"
#include "isa.h"

namespace fastft {

constexpr int kMaxLinears = 7;

struct NormWeight {
  const float* weight;  // the offset already added, or null
  const float* bias;    // or null
};

// One of the adapters that the rows of a batch choose from: a factor pair per linear layer.
struct LayerAdapter {
  FloatRows a[kMaxLinears];  // null where this layer has none
  FloatRows b[kMaxLinears];
  int64_t rank[kMaxLinears];
  float scale[kMaxLinears];
};

// What a layer is; fastft/ops/decoder_layer.py has the formula. Activations are float32.
struct DecoderLayer {
  int64_t hidden, heads;
  NormWeight attention_norm, mlp_norm, query_norm, key_norm;
  bool center;
  float eps;
  float scale, softcap;
  int64_t window;
  int linears;  // query, key, value or all in one; output; gate, up or one; down
  QuantizedLinear linear[kMaxLinears];  // of the weights alone
  const LayerAdapter* adapters;
  int adapter_count;
  bool gated;
  Activation activation;
};

// Keys or values of all rows: (batch, kv_heads, capacity, dim); strides in elements.
struct CacheSlots {
  void* data;
  int64_t row_stride, head_stride, slot_stride;
};
struct LayerCache {
  CacheSlots keys, values;
};

// The new tokens, which go through all layers.
struct DecoderStep {
  int64_t batch, tokens, queries, hidden, kv_heads, dim;
  const float* x;             // (tokens, hidden) contiguous
  const int32_t* cu_seqlens;  // (batch + 1): which of the tokens are a row's
  const int32_t* lengths;     // (batch): slots in use, the new tokens' included
  const int32_t* adapter_of;  // (batch): which adapter a row takes, -1 for none; or null
  DType cache_dtype;
  const float* cos;           // (tokens, 2 half) contiguous, or null
  const float* sin;
  int64_t half;
  float* out;                 // (tokens, hidden) contiguous
};

// One layer after the other, in one parallel region.
FASTFT_DECLARE(void decoder_layers(const DecoderLayer* const*, const LayerCache*, int count,
                                   const DecoderStep&))

}  // namespace fastft
