// Attention of a few new queries per sequence over a KV cache, on CUDA: the formulas, and the
// promise about bits, are those of fastft/ops/decode_attention.py.
#pragma once

#include "launch.h"

namespace fastft::cuda {

// (rows, tokens, heads, dim) in any order but for a contiguous last dimension.
struct CachedHeads {
  const void* data;
  int64_t row_stride, token_stride, head_stride;
};

struct DecodeAttention {
  DType dtype;
  int64_t batch, queries, heads, kv_heads, dim;  // none is 0; dim is a multiple of 8 up to 256
  int64_t capacity;        // at least 1
  const int32_t* lengths;  // (batch), read on the device; as 0 or capacity where they lie beyond
  CachedHeads q, k, v;
  float scale;
  int64_t window;   // slots that a query sees up to its own
  float softcap;    // 0: none
  float* partials;  // (batch, kv_heads, blocks, queries * heads / kv_heads * (dim + 2))
  void* out;        // (batch, queries, heads, dim)
};

// Slots of a block: partials hold (capacity + that - 1) / that of them.
constexpr int64_t kDecodeBlock = 128;

}  // namespace fastft::cuda

FASTFT_CUDA_API fastft::cuda::Failure fastft_decode_attention(
    const fastft::cuda::DecodeAttention*, fastft::cuda::Stream);
