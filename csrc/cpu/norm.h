// RMSNorm and LayerNorm over rows, with an optional residual added first. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// Strides are in elements; the innermost dimension is contiguous everywhere.
struct NormForward {
  DType dtype;
  int64_t rows, hidden;
  const void* x;         // (rows, hidden)
  int64_t x_stride;
  const void* residual;  // (rows, hidden) or null
  int64_t residual_stride;
  const float* weight;   // (hidden), the offset already added, or null
  const float* bias;     // (hidden) or null
  float eps;
  bool center;           // LayerNorm rather than RMSNorm
  void* y;               // (rows, hidden)
  void* total;           // (rows, hidden): x + residual, only with a residual
  float* mean;           // (rows), only when centring
  float* rstd;           // (rows)
};

struct NormBackward {
  DType dtype;
  int64_t rows, hidden;
  const void* dy;        // (rows, hidden)
  int64_t dy_stride;
  const void* dtotal;    // (rows, hidden) or null: upstream gradient of x + residual
  int64_t dtotal_stride;
  const void* x;         // (rows, hidden): what was normalised
  int64_t x_stride;
  const float* weight;   // (hidden), the offset already added, or null
  const float* mean;     // (rows) or null
  const float* rstd;     // (rows)
  bool center;
  void* dx;              // (rows, hidden)
  float* dweight;        // (blocks, hidden) partial sums, or null
  float* dbias;          // (blocks, hidden) partial sums, or null
  int64_t blocks;        // fixed by the row count alone: the same bits for any thread count
};

FASTFT_DECLARE(void norm_forward(const NormForward&))
// One row, by the calling thread; scratch holds `hidden` floats.
FASTFT_DECLARE(void norm_forward_row(const NormForward&, int64_t row, float* scratch))
FASTFT_DECLARE(void norm_backward(const NormBackward&))

}  // namespace fastft
