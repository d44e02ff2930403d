// Registers `fastft_cuda::cross_entropy`, forward, backward and in place: the operators of the same
// names in `fastft`, to be called and timed beside Triton's, which serve them.
#include "../../kernels/cuda/cross_entropy.h"

#include <tuple>

#include "launching.h"

namespace fastft::cuda {
namespace {

// The kernels' arguments, with the tensors that hold what was converted for them.
struct Call {
  CrossEntropy a{};
  std::optional<Tensor> weight, weight_sum, dlosses;
};

Call prepare(const Tensor& logits, const Tensor& labels, const OptionalTensor& weight,
             const OptionalTensor& dlosses, int64_t ignore_index,
             const std::vector<double>& numbers) {
  Call call;
  CrossEntropy& a = call.a;
  a.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected two dimensions");
  a.rows = logits.size(0), a.vocab = logits.size(1);
  STD_TORCH_CHECK(a.rows < (int64_t(1) << 31), "logits: expected fewer than 2^31 rows");
  check_rows(logits, "logits", a.rows, a.vocab);
  a.logits = logits.data_ptr(), a.logits_stride = logits.stride(0);
  check_vector(labels, "labels", a.rows);
  check_device(labels, "labels", logits);
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels: expected int64");
  a.labels = static_cast<const int64_t*>(labels.data_ptr()), a.labels_stride = labels.stride(0);
  a.ignore_index = ignore_index;
  if (weight) {
    check_vector(*weight, "weight", a.vocab);
    check_device(*weight, "weight", logits);
    call.weight = as_float(*weight);
    std::vector<int64_t> first{0};
    call.weight_sum = torch::stable::sum(*call.weight,
                                         torch::headeronly::IntHeaderOnlyArrayRef(first));
    a.weight = static_cast<const float*>(call.weight->data_ptr());
    a.weight_sum = static_cast<const float*>(call.weight_sum->data_ptr());
  }
  if (dlosses) {
    check_vector(*dlosses, "dlosses", a.rows);
    check_device(*dlosses, "dlosses", logits);
    call.dlosses = as_float(*dlosses);
    a.dlosses = static_cast<const float*>(call.dlosses->data_ptr());
    a.dlosses_stride = call.dlosses->stride(0);
  }
  STD_TORCH_CHECK(numbers.size() == 3, "numbers: expected smoothing, softcap and scale");
  a.label_smoothing = float(numbers[0]), a.softcap = float(numbers[1]);
  a.logit_scale = float(numbers[2]);
  return call;
}

bool empty(const CrossEntropy& a) { return a.rows == 0 || a.vocab == 0; }

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, OptionalTensor weight,
                                         int64_t ignore_index, std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, {}, ignore_index, numbers);
  CrossEntropy& a = call.a;
  Tensor losses = empty_float(logits, {a.rows}), stats = empty_float(logits, {a.rows, 2});
  if (empty(a)) return {torch::stable::zero_(losses), torch::stable::zero_(stats)};
  a.losses = static_cast<float*>(losses.data_ptr());
  a.stats = static_cast<float*>(stats.data_ptr());
  launch(logits, fastft_cross_entropy_forward, a);
  return {losses, stats};
}

Tensor cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, OptionalTensor weight,
                              Tensor stats, int64_t ignore_index, std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, dlosses, ignore_index, numbers);
  CrossEntropy& a = call.a;
  check_rows(stats, "stats", a.rows, 2);
  check_device(stats, "stats", logits);
  stats = as_float(stats);
  a.stats = static_cast<float*>(stats.data_ptr());
  Tensor dlogits = empty_rows(logits, a.rows, a.vocab);
  if (empty(a)) return dlogits;
  a.dlogits = dlogits.data_ptr(), a.dlogits_stride = a.vocab;
  launch(logits, fastft_cross_entropy_backward, a);
  return dlogits;
}

Tensor cross_entropy_in_place(Tensor logits, Tensor labels, OptionalTensor weight,
                              OptionalTensor dlosses, int64_t ignore_index,
                              std::vector<double> numbers) {
  Call call = prepare(logits, labels, weight, dlosses, ignore_index, numbers);
  CrossEntropy& a = call.a;
  Tensor losses = empty_float(logits, {a.rows});
  if (empty(a)) return torch::stable::zero_(losses);
  a.losses = static_cast<float*>(losses.data_ptr());
  a.dlogits = logits.data_ptr(), a.dlogits_stride = a.logits_stride;
  launch(logits, fastft_cross_entropy_both, a);
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft_cuda, m) {
  m.def(
      "cross_entropy(Tensor logits, Tensor labels, Tensor? weight, int ignore_index,"
      " float[] numbers) -> (Tensor losses, Tensor stats)");
  m.def(
      "cross_entropy_backward(Tensor dlosses, Tensor logits, Tensor labels, Tensor? weight,"
      " Tensor stats, int ignore_index, float[] numbers) -> Tensor dlogits");
  m.def(
      "cross_entropy_in_place(Tensor(a!) logits, Tensor labels, Tensor? weight, Tensor? dlosses,"
      " int ignore_index, float[] numbers) -> Tensor losses");
}

STABLE_TORCH_LIBRARY_IMPL(fastft_cuda, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_in_place", TORCH_BOX(&cross_entropy_in_place));
}

}  // namespace fastft::cuda
