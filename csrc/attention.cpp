// Registers `attention`, forward and backward, for the CPU.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "tensor.h"

namespace fastft {
namespace {

Heads heads_of(const Tensor& t, const char* name, const Tensor& like, int64_t tokens,
               int64_t heads) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == tokens && t.size(1) == heads &&
                      t.size(2) == like.size(2),
                  name, ": expected shape (", tokens, ", ", heads, ", ", like.size(2), ")");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of query");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(2) <= 1 || t.stride(2) == 1, name,
                  ": expected a contiguous last dimension");
  return {t.data_ptr(), t.stride(0), t.stride(1)};
}

// The bounds as the kernels read them; a bound out of order or beyond the tokens would be a wild
// read.
std::vector<int64_t> bounds_of(const Tensor& cu, const char* name, int64_t tokens) {
  STD_TORCH_CHECK(cu.dim() == 1 && cu.size(0) > 0, name, ": expected a vector of bounds");
  bool wide = cu.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || cu.scalar_type() == ScalarType::Int, name, ": expected int32 or int64");
  std::vector<int64_t> out(cu.size(0));
  for (int64_t i = 0; i < cu.size(0); ++i)
    out[i] = wide ? static_cast<const int64_t*>(cu.data_ptr())[i * cu.stride(0)]
                  : static_cast<const int32_t*>(cu.data_ptr())[i * cu.stride(0)];
  bool sorted = std::is_sorted(out.begin(), out.end());
  STD_TORCH_CHECK(sorted && out.front() == 0 && out.back() == tokens, name,
                  ": expected non-decreasing bounds from 0 to ", tokens);
  return out;
}

// The arguments of both passes, and the bounds they point into.
struct Call {
  AttentionForward a{};
  std::vector<int64_t> cu_q, cu_k;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
       const Tensor& cu_seqlens_k, const OptionalTensor& seed, double scale, bool causal,
       int64_t window, double softcap, double dropout) {
    a.dtype = dtype_of(query, "query");
    STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && key.size(1) > 0 &&
                        query.size(1) % key.size(1) == 0,
                    "key: expected (tokens, a divisor of query's heads, head_dim)");
    a.tokens_q = query.size(0), a.tokens_k = key.size(0);
    a.heads = query.size(1), a.kv_heads = key.size(1), a.dim = query.size(2);
    a.q = heads_of(query, "query", query, a.tokens_q, a.heads);
    a.k = heads_of(key, "key", query, a.tokens_k, a.kv_heads);
    a.v = heads_of(value, "value", query, a.tokens_k, a.kv_heads);
    cu_q = bounds_of(cu_seqlens_q, "cu_seqlens_q", a.tokens_q);
    cu_k = bounds_of(cu_seqlens_k, "cu_seqlens_k", a.tokens_k);
    STD_TORCH_CHECK(cu_q.size() == cu_k.size(), "cu_seqlens_k: expected as many entries as ",
                    "cu_seqlens_q has");
    a.cu_q = cu_q.data(), a.cu_k = cu_k.data(), a.sequences = int64_t(cu_q.size()) - 1;
    a.scale = float(scale), a.softcap = float(softcap), a.dropout = float(dropout);
    int64_t all = a.tokens_q + a.tokens_k;
    window = std::min<int64_t>(window, all);
    a.back = window < 0 ? all : causal ? window - 1 : window;
    a.ahead = causal ? 0 : window < 0 ? all : window;
    if (dropout > 0) {
      STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                      "seed: expected one int64 with dropout");
      a.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
      a.threshold = uint32_t(std::min(std::floor(dropout * 4294967296.0), 4294967295.0));
    }
  }
};

Tensor empty_heads(const Tensor& like) {
  return torch::stable::new_empty(like, {like.size(0), like.size(1), like.size(2)});
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q,
                                     Tensor cu_seqlens_k, OptionalTensor seed, double scale,
                                     bool causal, int64_t window, double softcap, double dropout) {
  Call call(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, causal, window, softcap,
            dropout);
  Tensor out = empty_heads(query), lse = empty_float(query, {call.a.heads, call.a.tokens_q});
  call.a.out = out.data_ptr(), call.a.lse = static_cast<float*>(lse.data_ptr());
  FASTFT_DISPATCH(attention_forward(call.a));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, OptionalTensor seed, double scale, bool causal,
    int64_t window, double softcap, double dropout, bool query_grad, bool key_grad,
    bool value_grad) {
  Call call(query, key, value, cu_seqlens_q, cu_seqlens_k, seed, scale, causal, window, softcap,
            dropout);
  AttentionForward& a = call.a;
  AttentionBackward b{};
  b.dout = heads_of(dout, "dout", query, a.tokens_q, a.heads);
  heads_of(out, "out", query, a.tokens_q, a.heads);
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == a.heads && lse.size(1) == a.tokens_q &&
                      lse.is_contiguous() && lse.scalar_type() == ScalarType::Float,
                  "lse: expected contiguous float32 of shape (", a.heads, ", ", a.tokens_q, ")");
  a.out = out.data_ptr(), a.lse = static_cast<float*>(lse.data_ptr());
  b.forward = a;
  Tensor dq = query_grad ? empty_heads(query) : nothing(query);
  Tensor dk = key_grad ? empty_heads(key) : nothing(key);
  Tensor dv = value_grad ? empty_heads(value) : nothing(value);
  b.dq = query_grad ? dq.data_ptr() : nullptr;
  b.dk = key_grad ? dk.data_ptr() : nullptr;
  b.dv = value_grad ? dv.data_ptr() : nullptr;
  FASTFT_DISPATCH(attention_backward(b));
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace fastft
