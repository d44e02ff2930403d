// Attention of a few new queries per sequence over a preallocated KV cache. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// (rows, tokens, heads, dim) in any order but for a contiguous last dimension; strides in elements.
struct CachedHeads {
  const void* data;
  int64_t row_stride, token_stride, head_stride;
};

struct DecodeAttention {
  DType dtype, query_dtype;  // of the cache; of queries and result: the same, or float32
  int64_t batch, queries, heads, kv_heads, dim;
  const int32_t* lengths;  // (batch): slots of the cache in use, the new tokens' included
  CachedHeads q, k, v;
  float scale;
  int64_t window;          // slots that a query sees up to its own
  float softcap;           // 0: none
  void* out;               // (batch, queries, heads, dim)
};

FASTFT_DECLARE(void decode_attention(const DecodeAttention&))
// The same inside a parallel region, whose threads all call it and return when all is computed, in
// `room` of as many floats, which they share.
FASTFT_DECLARE(int64_t decode_attention_floats(const DecodeAttention&, int threads))
FASTFT_DECLARE(void shared_decode_attention(const DecodeAttention&, float* room))

}  // namespace fastft
