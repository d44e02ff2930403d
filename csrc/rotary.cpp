// Registers `rotary`, forward and backward, for the CPU.
#include "cpu/rotary.h"

#include <tuple>

#include "tensor.h"

namespace fastft {
namespace {

Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : torch::stable::contiguous(t);
}

// A dense tensor; `swapped` exchanges dimensions 1 and 2 in memory.
Tensor empty_for(const Tensor& x, bool swapped) {
  if (!swapped) return torch::stable::new_empty(x, x.sizes());
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  return torch::stable::transpose(y, 1, 2);
}

void describe(Rotary& a, const Tensor& x, const Tensor& y, int64_t head_axis) {
  const int64_t token_axis = 3 - head_axis;
  a.parts[a.count++] = {x.size(head_axis),     x.data_ptr(),  x.stride(0),
                        x.stride(token_axis),  x.stride(head_axis),
                        y.data_ptr(),          y.stride(0),   y.stride(token_axis),
                        y.stride(head_axis)};
}

Tensor angles(const Tensor& t, const char* name, const Rotary& a) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == a.batch) &&
                      t.size(1) == a.tokens && t.size(2) <= a.head_dim && t.size(2) % 2 == 0,
                  name, ": expected shape (", a.batch, " or 1, ", a.tokens,
                  ", an even number up to ", a.head_dim, ")");
  DType dtype = dtype_of(t, name);
  if (dtype != DType::float32 && dtype != a.dtype) return as_float(t);
  return with_contiguous_rows(t);
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const OptionalTensor& k, const Tensor& cos_in,
                                  const Tensor& sin_in, int64_t head_axis, bool swapped,
                                  bool swapped_k, bool transposed) {
  STD_TORCH_CHECK(head_axis == 1 || head_axis == 2, "unsqueeze_dim: expected 1 or 2");
  STD_TORCH_CHECK(q.dim() == 4, "q: expected four dimensions");
  Rotary a{};
  a.dtype = dtype_of(q, "q");
  a.batch = q.size(0), a.tokens = q.size(3 - head_axis), a.head_dim = q.size(3);
  Tensor cos = angles(cos_in, "cos", a), sin = angles(sin_in, "sin", a);
  if (cos.scalar_type() != sin.scalar_type()) cos = as_float(cos), sin = as_float(sin);
  STD_TORCH_CHECK(cos.size(2) == sin.size(2), "sin: expected the shape of cos");
  a.half = cos.size(2) / 2, a.angle_dtype = dtype_of(cos, "cos");
  a.cos = cos.data_ptr(), a.sin = sin.data_ptr();
  a.cos_batch = cos.size(0) == 1 ? 0 : cos.stride(0), a.cos_token = cos.stride(1);
  a.sin_batch = sin.size(0) == 1 ? 0 : sin.stride(0), a.sin_token = sin.stride(1);
  a.transposed = transposed;
  Tensor q_rows = with_contiguous_rows(q), q_out = empty_for(q, swapped);
  describe(a, q_rows, q_out, head_axis);
  if (!k) {
    FASTFT_DISPATCH(rotary(a));
    return {q_out, nothing(q)};
  }
  STD_TORCH_CHECK(k->dim() == 4 && k->size(0) == a.batch && k->size(3 - head_axis) == a.tokens &&
                      k->size(3) == a.head_dim && k->scalar_type() == q.scalar_type(),
                  "k: expected the batch, tokens, head_dim and dtype of q");
  Tensor k_rows = with_contiguous_rows(*k), k_out = empty_for(*k, swapped_k);
  describe(a, k_rows, k_out, head_axis);
  FASTFT_DISPATCH(rotary(a));
  return {q_out, k_out};
}

bool is_swapped(const Tensor& x) { return x.stride(1) < x.stride(2); }

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor cos, Tensor sin,
                                   int64_t unsqueeze_dim) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k: expected four dimensions");
  return rotate(q, k, cos, sin, unsqueeze_dim, is_swapped(q), is_swapped(k), false);
}

std::tuple<Tensor, Tensor> backward(Tensor dq, OptionalTensor dk, Tensor cos, Tensor sin,
                                    int64_t unsqueeze_dim, bool swapped) {
  return rotate(dq, dk, cos, sin, unsqueeze_dim, swapped, swapped, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("rotary", TORCH_BOX(&forward));
  m.impl("rotary_backward", TORCH_BOX(&backward));
}

}  // namespace fastft
