// Registers `rms_norm` and `layer_norm`, forward and backward, for the CPU.
#include "cpu/norm.h"

#include <algorithm>
#include <tuple>

#include "tensor.h"

namespace fastft {
namespace {

// Enough blocks for the cores of a large machine, few enough that adding them up costs nothing.
int64_t blocks_for(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 64); }

// offset + weight in float32; `values` is null without a weight.
class Weight {
 public:
  Weight(const OptionalTensor& weight, int64_t hidden, float offset) {
    if (!weight) return;
    check_vector(*weight, "weight", hidden);
    floats_ = as_float(*weight);
    values = static_cast<const float*>(floats_->data_ptr());
    if (offset == 0) return;
    shifted_.assign(values, values + hidden);
    for (float& w : shifted_) w += offset;
    values = shifted_.data();
  }
  const float* values = nullptr;

 private:
  std::optional<Tensor> floats_;
  std::vector<float> shifted_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, double offset, bool center) {
  NormForward a{};
  a.dtype = dtype_of(x, "x");
  a.rows = x.size(0), a.hidden = x.size(1);
  check_rows(x, "x", a.rows, a.hidden);
  a.x = x.data_ptr(), a.x_stride = x.stride(0);
  if (residual) check_rows_like(*residual, "residual", x);
  a.residual = data_or_null(residual), a.residual_stride = row_stride_or_zero(residual);
  Weight factor(weight, a.hidden, float(offset));
  a.weight = factor.values;
  std::optional<Tensor> biases;
  if (bias) {
    check_vector(*bias, "bias", a.hidden);
    biases = as_float(*bias);
    a.bias = static_cast<const float*>(biases->data_ptr());
  }
  a.eps = float(eps), a.center = center;
  Tensor y = empty_rows(x, a.rows, a.hidden);
  Tensor total = residual ? empty_rows(x, a.rows, a.hidden) : nothing(x);
  Tensor mean = empty_float(x, {center ? a.rows : 0}), rstd = empty_float(x, {a.rows});
  a.y = y.data_ptr(), a.total = total.data_ptr();
  a.mean = static_cast<float*>(mean.data_ptr()), a.rstd = static_cast<float*>(rstd.data_ptr());
  FASTFT_DISPATCH(norm_forward(a));
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const OptionalTensor& dtotal, const Tensor& x, const OptionalTensor& weight,
    const OptionalTensor& mean, const Tensor& rstd, double offset, bool center, bool weight_grad,
    bool bias_grad) {
  NormBackward a{};
  a.dtype = dtype_of(x, "x");
  a.rows = x.size(0), a.hidden = x.size(1);
  check_rows(x, "x", a.rows, a.hidden);
  check_rows_like(dy, "dy", x);
  if (dtotal) check_rows_like(*dtotal, "dtotal", x);
  a.x = x.data_ptr(), a.x_stride = x.stride(0);
  a.dy = dy.data_ptr(), a.dy_stride = dy.stride(0);
  a.dtotal = data_or_null(dtotal), a.dtotal_stride = row_stride_or_zero(dtotal);
  a.rstd = floats_of(rstd, "rstd", a.rows);
  if (mean) a.mean = floats_of(*mean, "mean", a.rows);
  Weight factor(weight, a.hidden, float(offset));
  a.weight = factor.values;
  a.center = center;
  a.blocks = blocks_for(a.rows);
  Tensor dx = empty_rows(x, a.rows, a.hidden);
  a.dx = dx.data_ptr();
  Tensor dweight = empty_float(x, {weight_grad ? a.blocks : 0, a.hidden});
  Tensor dbias = empty_float(x, {bias_grad ? a.blocks : 0, a.hidden});
  if (weight_grad) a.dweight = static_cast<float*>(dweight.data_ptr());
  if (bias_grad) a.dbias = static_cast<float*>(dbias.data_ptr());
  FASTFT_DISPATCH(norm_backward(a));
  ScalarType dtype = weight ? weight->scalar_type() : ScalarType::Float;
  return {dx, weight_grad ? sum_blocks(dweight, dtype) : nothing(x),
          bias_grad ? sum_blocks(dbias, dtype) : nothing(x)};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, OptionalTensor residual,
                                            OptionalTensor weight, double eps, double offset) {
  auto [y, total, mean, rstd] = forward(x, residual, weight, {}, eps, offset, false);
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptionalTensor dtotal, Tensor x,
                                             OptionalTensor weight, Tensor rstd, double offset,
                                             bool weight_grad) {
  auto [dx, dweight, dbias] =
      backward(dy, dtotal, x, weight, {}, rstd, offset, false, weight_grad, false);
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, OptionalTensor residual,
                                                      OptionalTensor weight, OptionalTensor bias,
                                                      double eps) {
  return forward(x, residual, weight, bias, eps, 0, true);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, OptionalTensor dtotal, Tensor x,
                                                       OptionalTensor weight, Tensor mean,
                                                       Tensor rstd, bool weight_grad,
                                                       bool bias_grad) {
  return backward(dy, dtotal, x, weight, mean, rstd, 0, true, weight_grad, bias_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace fastft
