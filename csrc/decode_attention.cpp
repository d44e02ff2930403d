// Registers `decode_attention` for the CPU.
#include "cpu/decode_attention.h"

#include <limits>

#include "tensor.h"

namespace fastft {
namespace {

void check_heads(const Tensor& t, const char* name, const Tensor& query) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == query.size(0) && t.size(3) == query.size(3), name,
                  ": expected 4 dimensions, the first and last as query's");
  STD_TORCH_CHECK(t.scalar_type() == query.scalar_type(), name, ": expected the dtype of query");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(3) <= 1 || t.stride(3) == 1, name,
                  ": expected a contiguous last dimension");
}

CachedHeads cache_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
}

Tensor decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths,
                        double scale, int64_t window, double softcap) {
  DecodeAttention a{};
  a.dtype = a.query_dtype = dtype_of(query, "query");
  check_heads(query, "query", query);
  check_heads(key_cache, "key_cache", query);
  check_heads(value_cache, "value_cache", query);
  a.batch = query.size(0), a.queries = query.size(1), a.heads = query.size(2);
  a.dim = query.size(3), a.kv_heads = key_cache.size(1);
  STD_TORCH_CHECK(a.kv_heads > 0 && a.heads % a.kv_heads == 0,
                  "key_cache: expected a divisor of query's heads");
  STD_TORCH_CHECK(value_cache.size(1) == a.kv_heads && value_cache.size(2) == key_cache.size(2),
                  "value_cache: expected the shape of key_cache");
  check_vector(lengths, "lengths", a.batch);
  STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Int, "lengths: expected int32");
  Tensor used = lengths.is_contiguous() ? lengths : torch::stable::contiguous(lengths);
  a.lengths = static_cast<const int32_t*>(used.data_ptr());
  for (int64_t row = 0; row < a.batch; ++row)
    STD_TORCH_CHECK(a.lengths[row] >= 0 && a.lengths[row] <= key_cache.size(2),
                    "lengths: expected 0 to the capacity of ", key_cache.size(2), ", got ",
                    a.lengths[row]);
  a.q = {query.data_ptr(), query.stride(0), query.stride(1), query.stride(2)};
  a.k = cache_of(key_cache), a.v = cache_of(value_cache);
  a.scale = float(scale), a.softcap = float(softcap);
  a.window = window < 0 ? std::numeric_limits<int32_t>::max() : window;
  Tensor out = torch::stable::new_empty(query, {a.batch, a.queries, a.heads, a.dim});
  a.out = out.data_ptr();
  FASTFT_DISPATCH(decode_attention(a));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastft
