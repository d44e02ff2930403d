// Registers `decode_attention` for CUDA.
#include "../../kernels/cuda/decode_attention.h"

#include <algorithm>

#include "launching.h"

namespace fastft::cuda {
namespace {

void check_heads(const Tensor& t, const char* name, const Tensor& query) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == query.size(0) && t.size(3) == query.size(3), name,
                  ": expected 4 dimensions, the first and last as query's");
  STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), name, ": expected the dtype of query");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(3) <= 1 || t.stride(3) == 1, name,
                  ": expected a contiguous last dimension");
  check_device(t, name, query);
}

CachedHeads cache_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
}

Tensor decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths,
                        double scale, int64_t window, double softcap) {
  DecodeAttention a{};
  a.dtype = dtype_of(query, "query");
  check_heads(query, "query", query);
  check_heads(key_cache, "key_cache", query);
  check_heads(value_cache, "value_cache", query);
  a.batch = query.size(0), a.queries = query.size(1), a.heads = query.size(2);
  a.dim = query.size(3), a.kv_heads = key_cache.size(1), a.capacity = key_cache.size(2);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
                  "key_cache: expected a divisor of query's heads");
  STD_TORCH_CHECK(value_cache.size(1) == a.kv_heads && value_cache.size(2) == a.capacity,
                  "value_cache: expected the shape of key_cache");
  STD_TORCH_CHECK(a.capacity < (int64_t(1) << 31) - kDecodeBlock,
                  "key_cache: expected fewer than 2^31 slots");
  STD_TORCH_CHECK(a.dim % 8 == 0 && a.dim <= 256,
                  "query: expected a head_dim that is a multiple of 8 up to 256, got ", a.dim);
  check_vector(lengths, "lengths", a.batch);
  check_device(lengths, "lengths", query);
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int, "lengths: expected int32");
  Tensor used = lengths.is_contiguous() ? lengths : torch::stable::contiguous(lengths);
  a.lengths = static_cast<const int32_t*>(used.data_ptr());
  a.q = {query.data_ptr(), query.stride(0), query.stride(1), query.stride(2)};
  a.k = cache_of(key_cache), a.v = cache_of(value_cache);
  a.scale = float(scale), a.softcap = float(softcap);
  a.window = window < 0 ? a.capacity : std::min(window, a.capacity);
  Tensor out = torch::stable::new_empty(query, {a.batch, a.queries, a.heads, a.dim});
  if (out.numel() == 0 || a.capacity == 0) return torch::stable::zero_(out);
  int64_t blocks = (a.capacity + kDecodeBlock - 1) / kDecodeBlock;
  Tensor partials = empty_float(query, {a.batch * a.heads * a.queries, blocks, a.dim + 2});
  a.partials = static_cast<float*>(partials.data_ptr());
  a.out = out.data_ptr();
  launch(query, fastft_decode_attention, a);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastft::cuda
