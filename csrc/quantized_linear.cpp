// Registers `quantized_linear` for the CPU.
#include "cpu/quantized_linear.h"

#include "quantized_linear_arguments.h"

namespace fastft {
namespace {

Tensor quantized_linear(Tensor x, Tensor values, OptionalTensor scale, OptionalTensor bias,
                        OptionalTensor low, OptionalTensor high, double lora_scale,
                        bool round_inputs) {
  QuantizedLinear a =
      quantized_linear_argument(x, values, scale, bias, low, high, lora_scale, round_inputs);
  Tensor y = empty_rows(x, a.rows, a.out);
  a.y = y.data_ptr(), a.y_stride = a.out;
  FASTFT_DISPATCH(quantized_linear(a));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace fastft
