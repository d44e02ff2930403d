// Registers the thin products of low-rank adapters for the CPU: `low_rank_dot`, `low_rank_sum` and
// `low_rank_add_`. The operators `lora*` are composed of these and a library's GEMM (fastft/ops).
#include "cpu/lora.h"

#include "tensor.h"

namespace fastft {
namespace {

LowRank wide_side(const Tensor& matrix, const OptionalTensor& mask, double keep_scale,
                  double scale) {
  LowRank a{};
  a.dtype = dtype_of(matrix, "matrix");
  STD_TORCH_CHECK(matrix.dim() == 2, "matrix: expected shape (rows, columns)");
  a.rows = matrix.size(0), a.columns = matrix.size(1);
  check_rows(matrix, "matrix", a.rows, a.columns);
  a.matrix = matrix.data_ptr(), a.matrix_stride = matrix.stride(0);
  if (mask) {
    check_rows(*mask, "mask", a.rows, a.columns);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous(),
                    "mask: expected a contiguous bool tensor");
    a.mask = static_cast<const uint8_t*>(mask->data_ptr());
  }
  a.keep_scale = float(keep_scale), a.scale = float(scale);
  return a;
}

void set_narrow(LowRank& a, const Tensor& narrow) {
  a.rank = narrow.size(1);
  check_rows(narrow, "narrow", a.rows, a.rank);
  STD_TORCH_CHECK(narrow.scalar_type() == ScalarType::Float, "narrow: expected float32");
  a.narrow = static_cast<const float*>(narrow.data_ptr()), a.narrow_stride = narrow.stride(0);
}

// The narrow side is small, so another dtype or layout costs a copy nobody notices.
Tensor wide_factor(LowRank& a, const Tensor& wide) {
  a.rank = wide.size(0);
  STD_TORCH_CHECK(wide.dim() == 2 && wide.size(1) == a.columns, "wide: expected shape (rank, ",
                  a.columns, ")");
  Tensor floats = as_float(wide);
  a.wide = static_cast<const float*>(floats.data_ptr());
  return floats;
}

Tensor low_rank_dot(Tensor matrix, Tensor wide, OptionalTensor mask, double keep_scale,
                    double scale) {
  LowRank a = wide_side(matrix, mask, keep_scale, scale);
  Tensor floats = wide_factor(a, wide);
  Tensor out = empty_float(matrix, {a.rows, a.rank});
  a.out = static_cast<float*>(out.data_ptr());
  FASTFT_DISPATCH(low_rank_dot(a));
  return out;
}

Tensor low_rank_sum(Tensor matrix, Tensor narrow, OptionalTensor mask, double keep_scale,
                    double scale) {
  LowRank a = wide_side(matrix, mask, keep_scale, scale);
  set_narrow(a, narrow);
  Tensor out = empty_float(matrix, {a.rank, a.columns});
  a.out = static_cast<float*>(out.data_ptr());
  FASTFT_DISPATCH(low_rank_sum(a));
  return out;
}

void low_rank_add_(Tensor matrix, Tensor narrow, Tensor wide, OptionalTensor mask,
                   double keep_scale, double scale) {
  LowRank a = wide_side(matrix, mask, keep_scale, scale);
  Tensor floats = wide_factor(a, wide);
  set_narrow(a, narrow);
  STD_TORCH_CHECK(a.rank == wide.size(0), "narrow: expected ", wide.size(0), " columns");
  FASTFT_DISPATCH(low_rank_add(a));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("low_rank_dot", TORCH_BOX(&low_rank_dot));
  m.impl("low_rank_sum", TORCH_BOX(&low_rank_sum));
  m.impl("low_rank_add_", TORCH_BOX(&low_rank_add_));
}

}  // namespace fastft
