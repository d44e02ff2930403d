// Registers `cross_entropy`, forward, backward and in place, for the CPU.
#include "cpu/cross_entropy.h"

#include <tuple>

#include "tensor.h"

namespace fastft {
namespace {

// The kernels' arguments, with the tensors that hold what was converted for them.
struct Call {
  CrossEntropy a{};
  Tensor labels;
  std::optional<Tensor> weight, dlosses;
};

// numbers: label smoothing, softcap (0: none), logit scale.
Call prepare(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight,
             const OptionalTensor& dlosses, int64_t ignore_index,
             const std::vector<double>& numbers) {
  Call call{{}, torch::stable::contiguous(labels), {}, {}};
  CrossEntropy& a = call.a;
  a.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected two dimensions");
  a.rows = logits.size(0), a.vocab = logits.size(1);
  check_rows(logits, "logits", a.rows, a.vocab);
  a.logits = logits.data_ptr(), a.logits_stride = logits.stride(0);
  check_vector(labels, "labels", a.rows);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: expected int64");
  a.labels = static_cast<const int64_t*>(call.labels.data_ptr());
  a.ignore_index = ignore_index;
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t label = a.labels[row];
    STD_TORCH_CHECK(label == ignore_index || (label >= 0 && label < a.vocab), "labels: position ",
                    row, " has ", label, ", expected 0 to ", a.vocab - 1, " or ignore_index ",
                    ignore_index);
  }
  a.weight_sum = double(a.vocab);
  if (weight) {
    check_vector(*weight, "weight", a.vocab);
    call.weight = as_float(*weight);
    a.weight = static_cast<const float*>(call.weight->data_ptr());
    a.weight_sum = 0;
    for (int64_t i = 0; i < a.vocab; ++i) a.weight_sum += a.weight[i];
  }
  if (dlosses) {
    check_vector(*dlosses, "dlosses", a.rows);
    call.dlosses = as_float(*dlosses);
    a.dlosses = static_cast<const float*>(call.dlosses->data_ptr());
  }
  STD_TORCH_CHECK(numbers.size() == 3, "numbers: expected smoothing, softcap and scale");
  a.label_smoothing = float(numbers[0]), a.softcap = float(numbers[1]);
  a.logit_scale = float(numbers[2]);
  return call;
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, OptionalTensor weight,
                                         int64_t ignore_index, std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, {}, ignore_index, numbers);
  CrossEntropy& a = call.a;
  Tensor losses = empty_float(logits, {a.rows}), stats = empty_float(logits, {a.rows, 2});
  a.losses = static_cast<float*>(losses.data_ptr());
  a.stats = static_cast<float*>(stats.data_ptr());
  FASTFT_DISPATCH(cross_entropy_forward(a));
  return {losses, stats};
}

Tensor cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, OptionalTensor weight,
                              Tensor stats, int64_t ignore_index, std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, dlosses, ignore_index, numbers);
  CrossEntropy& a = call.a;
  check_rows(stats, "stats", a.rows, 2);
  stats = as_float(stats);
  a.stats = static_cast<float*>(stats.data_ptr());
  Tensor dlogits = empty_rows(logits, a.rows, a.vocab);
  a.dlogits = dlogits.data_ptr(), a.dlogits_stride = a.vocab;
  FASTFT_DISPATCH(cross_entropy_backward(a));
  return dlogits;
}

Tensor cross_entropy_in_place(Tensor logits, Tensor labels, OptionalTensor weight,
                              OptionalTensor dlosses, int64_t ignore_index,
                              std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, dlosses, ignore_index, numbers);
  CrossEntropy& a = call.a;
  Tensor losses = empty_float(logits, {a.rows});
  a.losses = static_cast<float*>(losses.data_ptr());
  a.dlogits = logits.data_ptr(), a.dlogits_stride = a.logits_stride;
  FASTFT_DISPATCH(cross_entropy_both(a));
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_in_place", TORCH_BOX(&cross_entropy_in_place));
}

}  // namespace fastft
