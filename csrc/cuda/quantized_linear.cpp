// Registers `quantized_linear` for CUDA.
#include "../../kernels/cuda/quantized_linear.h"

#include "../quantized_linear_arguments.h"
#include "launching.h"

namespace fastft::cuda {
namespace {

// What a grid holds: at most a block per row and 8 outputs, and one per element of x A^T.
constexpr int64_t kMost = (int64_t(1) << 31) - 1;

Tensor quantized_linear(Tensor x, Tensor values, OptionalTensor scale, OptionalTensor bias,
                        OptionalTensor low, OptionalTensor high, double lora_scale,
                        bool round_inputs) {
  check_device(values, "values", x);
  if (scale) check_device(*scale, "scale", x);
  if (bias) check_device(*bias, "bias", x);
  if (low) check_device(*low, "a", x);
  if (high) check_device(*high, "b", x);
  const ScalarType type = x.scalar_type(), stored = values.scalar_type();
  const bool plain = stored != ScalarType::Char && stored != ScalarType::Byte;
  // The tensor cores take one type; in float32 every weight is exact.
  const bool widens = plain && stored != type && type != ScalarType::Float;
  Tensor own = widens ? torch::stable::to(x, ScalarType::Float) : x;
  QuantizedLinear a =
      quantized_linear_argument(own, values, scale, bias, low, high, lora_scale, round_inputs);
  STD_TORCH_CHECK(!a.transposed, "values: expected a contiguous last dimension");
  STD_TORCH_CHECK(a.in <= kMost, "x: expected fewer than 2^31 inputs, got ", a.in);
  STD_TORCH_CHECK(a.rows * ((a.out + 7) / 8) <= kMost && a.rows * a.rank <= kMost,
                  "x: expected fewer rows than ", a.rows, " for a weight of ", a.out, " outputs");
  if (a.rows == 0 || a.out == 0) return empty_rows(x, a.rows, a.out);
  Tensor y = empty_rows(own, a.rows, a.out), workspace = empty_float(x, {a.rows, a.rank});
  a.y = y.data_ptr(), a.y_stride = a.out, a.low = static_cast<float*>(workspace.data_ptr());
  launch(x, fastft_quantized_linear, a);
  return widens ? torch::stable::to(y, type) : y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CUDA, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace fastft::cuda
