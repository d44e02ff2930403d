// Registers `gated_mlp`, forward and backward, for the CPU.
#include "cpu/gated_mlp.h"

#include <string>
#include <tuple>

#include "tensor.h"

namespace fastft {
namespace {

// Takes the handle over. Not a std::string as argument: PyTorch's conversion leaks one a call.
Activation activation_of(StringHandle handle) {
  const char* data;
  size_t length;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  const std::string name(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "activation: expected silu, gelu or gelu_tanh, got ", name);
  return Activation::gelu_tanh;
}

// A tensor read as rows at one distance, copied only where its strides do not allow that.
struct Rows {
  Tensor tensor;
  int64_t stride;

  explicit Rows(const Tensor& t) : tensor(t), stride(0) {
    const int64_t last = t.dim() - 1;
    bool regular = t.size(last) <= 1 || t.stride(last) == 1;
    int64_t expected = -1;
    for (int64_t i = last - 1; i >= 0 && regular; --i) {
      if (t.size(i) == 1) continue;
      if (expected < 0) stride = t.stride(i);
      else regular = t.stride(i) == expected;
      expected = t.stride(i) * t.size(i);
    }
    if (!regular) {
      tensor = torch::stable::contiguous(t);
      stride = t.size(last);
    }
  }
  bool dense(int64_t rows, int64_t columns) const { return rows <= 1 || stride == columns; }
};

struct Shape {
  int64_t rows, columns;
};

Shape shape_of(const Tensor& gate) {
  STD_TORCH_CHECK(gate.dim() >= 1, "gate: expected at least one dimension");
  const int64_t columns = gate.size(-1);
  return {columns == 0 ? 0 : gate.numel() / columns, columns};
}

void check_like(const Tensor& t, const char* name, const Tensor& gate) {
  bool same = t.dim() == gate.dim() && t.scalar_type() == gate.scalar_type();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == gate.size(i);
  STD_TORCH_CHECK(same, name, ": expected the shape and dtype of gate");
}

Tensor forward(Tensor gate, Tensor up, StringHandle name) {
  const Activation activation = activation_of(name);
  auto [rows, columns] = shape_of(gate);
  check_like(up, "up", gate);
  Rows gates(gate), ups(up);
  if (gates.dense(rows, columns) && ups.dense(rows, columns)) columns *= rows, rows = 1;
  Tensor h = torch::stable::new_empty(gate, gate.sizes());
  GatedForward a{dtype_of(gate, "gate"),  activation,             rows,         columns,
                 gates.tensor.data_ptr(), ups.tensor.data_ptr(), gates.stride, ups.stride,
                 h.data_ptr()};
  FASTFT_DISPATCH(gated_forward(a));
  return h;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor dh, Tensor gate, Tensor up,
                                            StringHandle name, bool with_h) {
  const Activation activation = activation_of(name);
  auto [rows, columns] = shape_of(gate);
  check_like(dh, "dh", gate);
  check_like(up, "up", gate);
  Rows grads(dh), gates(gate), ups(up);
  if (grads.dense(rows, columns) && gates.dense(rows, columns) && ups.dense(rows, columns))
    columns *= rows, rows = 1;
  Tensor h = with_h ? torch::stable::new_empty(gate, gate.sizes()) : nothing(gate);
  Tensor dgate = torch::stable::new_empty(gate, gate.sizes());
  Tensor dup = torch::stable::new_empty(gate, gate.sizes());
  GatedBackward a{dtype_of(gate, "gate"),
                  activation,
                  rows,
                  columns,
                  grads.tensor.data_ptr(),
                  gates.tensor.data_ptr(),
                  ups.tensor.data_ptr(),
                  grads.stride,
                  gates.stride,
                  ups.stride,
                  with_h ? h.data_ptr() : nullptr,
                  dgate.data_ptr(),
                  dup.data_ptr()};
  FASTFT_DISPATCH(gated_backward(a));
  return {h, dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastft, CPU, m) {
  m.impl("gated_mlp", TORCH_BOX(&forward));
  m.impl("gated_mlp_backward", TORCH_BOX(&backward));
}

}  // namespace fastft
