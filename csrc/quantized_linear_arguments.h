// From the tensors of `quantized_linear` to its kernels' argument, checked.
#pragma once

#include "quantized_linear.h"
#include "tensor.h"

namespace fastft {

inline FloatRows float_rows(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check_rows(t, name, rows, columns);
  return {t.data_ptr(), dtype_of(t, name), t.stride(0)};
}

inline void set_weight(QuantizedLinear& a, const Tensor& values, const OptionalTensor& scale) {
  const ScalarType type = values.scalar_type();
  STD_TORCH_CHECK(values.dim() == 2, "values: expected two dimensions");
  a.out = values.size(0);
  a.in = values.size(1) * (type == ScalarType::Byte ? 2 : 1);
  a.values = values.data_ptr(), a.values_stride = values.stride(0);
  // The view (out, in) of a weight that lies as (in, out), as GPT-2's do.
  a.transposed = values.stride(1) != 1 && values.stride(0) == 1 && values.size(1) > 1 &&
                 type != ScalarType::Char && type != ScalarType::Byte;
  if (a.transposed) a.values_stride = values.stride(1);
  else check_rows(values, "values", a.out, values.size(1));
  if (type != ScalarType::Char && type != ScalarType::Byte) {
    STD_TORCH_CHECK(!scale, "scale: expected none with floating-point values");
    a.layout = static_cast<WeightLayout>(dtype_of(values, "values"));
    return;
  }
  STD_TORCH_CHECK(scale && scale->dim() == 2, "scale: expected two dimensions");
  const int64_t groups = scale->size(1);
  check_rows(*scale, "scale", a.out, groups);
  a.scale = scale->data_ptr(), a.scale_stride = scale->stride(0);
  if (type == ScalarType::Char && scale->scalar_type() == ScalarType::Float) {
    STD_TORCH_CHECK(groups == 1, "scale: expected one float32 per row of int8 values");
    a.layout = WeightLayout::int8;
    return;
  }
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::BFloat16, "scale: expected bfloat16");
  a.group = groups ? a.in / groups : 32;
  STD_TORCH_CHECK(a.group * groups == a.in && (a.group == 32 || a.group == 64),
                  "scale: expected one per 32 or 64 of ", a.in, " inputs, got ", groups);
  a.layout = type == ScalarType::Byte ? WeightLayout::int4 : WeightLayout::int8_grouped;
}

// All but y and low. The tensors must outlive the argument.
inline QuantizedLinear quantized_linear_argument(
    const Tensor& x, const Tensor& values, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& low, const OptionalTensor& high, double lora_scale, bool round_inputs) {
  QuantizedLinear a{};
  set_weight(a, values, scale);
  STD_TORCH_CHECK(x.dim() == 2, "x: expected shape (rows, in)");
  a.rows = x.size(0);
  a.x = float_rows(x, "x", a.rows, a.in);
  if (bias) {
    check_vector(*bias, "bias", a.out);
    a.bias = {bias->data_ptr(), dtype_of(*bias, "bias"), bias->stride(0)};
  }
  STD_TORCH_CHECK(low.has_value() == high.has_value(), "a, b: expected both or neither");
  if (low) {
    a.rank = low->size(0);
    a.a = float_rows(*low, "a", a.rank, a.in);
    a.b = float_rows(*high, "b", a.out, a.rank);
  }
  a.lora_scale = float(lora_scale);
  a.round_inputs = round_inputs && scale.has_value();
  return a;
}

}  // namespace fastft
