// act(gate) * up, the middle of a gated MLP, and its gradients. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

enum class Activation { silu, gelu, gelu_tanh };

// Strides between rows are in elements; rows are contiguous.
struct GatedForward {
  DType dtype;
  Activation activation;
  int64_t rows, columns;
  const void* gate;  // (rows, columns)
  const void* up;    // (rows, columns), or null: the activation alone
  int64_t gate_stride, up_stride;
  void* h;           // (rows, columns), dense
};

struct GatedBackward {
  DType dtype;
  Activation activation;
  int64_t rows, columns;
  const void* dh;    // (rows, columns)
  const void* gate;  // (rows, columns)
  const void* up;    // (rows, columns)
  int64_t dh_stride, gate_stride, up_stride;
  void* h;           // (rows, columns), dense, or null
  void* dgate;       // (rows, columns), dense
  void* dup;         // (rows, columns), dense
};

FASTFT_DECLARE(void gated_forward(const GatedForward&))
// One row, by the calling thread.
FASTFT_DECLARE(void gated_forward_row(const GatedForward&, int64_t row))
FASTFT_DECLARE(void gated_backward(const GatedBackward&))

}  // namespace fastft
