// Softmax attention over packed sequences, forward and backward. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// (tokens, heads, dim) with a contiguous last dimension; strides in elements.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
};

struct AttentionForward {
  DType dtype;
  int64_t sequences, tokens_q, tokens_k, heads, kv_heads, dim;
  const int64_t* cu_q;  // (sequences + 1)
  const int64_t* cu_k;  // (sequences + 1)
  Heads q, k, v;
  float scale;
  // A query at position p of the keys sees the keys from p - back to p + ahead.
  int64_t back, ahead;
  float softcap;        // 0: none
  float dropout;        // 0: none
  uint32_t threshold;   // what a hash must reach for its probability to be kept
  uint64_t seed;
  void* out;            // (tokens_q, heads, dim)
  float* lse;           // (heads, tokens_q)
};

struct AttentionBackward {
  AttentionForward forward;  // with the `out` and `lse` it gave
  Heads dout;
  void* dq;  // (tokens_q, heads, dim) or null
  void* dk;  // (tokens_k, kv_heads, dim) or null
  void* dv;  // (tokens_k, kv_heads, dim) or null
};

FASTFT_DECLARE(void attention_forward(const AttentionForward&))
FASTFT_DECLARE(void attention_backward(const AttentionBackward&))

}  // namespace fastft
