// What every operator needs between PyTorch's stable ABI and the torch-free kernels: element types,
// checks of the layout a kernel relies on, and small tensors in float32.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/isa.h"

namespace fastft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
      return DType::float32;
  }
}

// A matrix whose rows are contiguous; rows may lie apart.
inline void check_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                  ": expected shape (", rows, ", ", columns, ")");
  STD_TORCH_CHECK(t.stride(1) == 1 || columns <= 1 || rows == 0, name,
                  ": expected a contiguous last dimension");
}
inline void check_rows_like(const Tensor& t, const char* name, const Tensor& like) {
  check_rows(t, name, like.size(0), like.size(1));
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the dtype of x");
}
inline void check_vector(const Tensor& t, const char* name, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, ": expected shape (", size, ")");
}

// What a forward left for its backward: read as it lies.
inline const float* floats_of(const Tensor& t, const char* name, int64_t size) {
  check_vector(t, name, size);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  ": expected contiguous float32");
  return static_cast<const float*>(t.data_ptr());
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }
inline int64_t row_stride_or_zero(const OptionalTensor& t) { return t ? t->stride(0) : 0; }

inline Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}
inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// A contiguous float32 copy, or the tensor itself where it already is one.
inline Tensor as_float(const Tensor& t) {
  // Asked first, because a call of PyTorch costs as much as a small kernel.
  if (t.scalar_type() != ScalarType::Float)
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// (blocks, hidden) partial sums, made by fixed blocks of rows: added up in the same order always.
inline Tensor sum_blocks(const Tensor& partial, ScalarType dtype) {
  std::vector<int64_t> first{0};
  Tensor total = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(first));
  return dtype == ScalarType::Float ? total : torch::stable::to(total, dtype);
}

}  // namespace fastft
