// Products of integers for layers with frozen int8 weights; fastft/ops/int8_linear.py has the
// formulas. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// y = (a b^T) a_scale b_scale + bias, or a b where b is transposed.
struct Int8Product {
  int64_t rows, inner, out;
  const int8_t* a;        // (rows, inner) contiguous
  const float* a_scale;   // (rows)
  const int8_t* b;        // (out, inner), or (inner, out)
  int64_t b_stride;
  bool transposed;
  const float* b_scale;   // (out) or null
  const float* bias;      // (out) or null
  float* y;               // (rows, out) contiguous
};

// y = sums row_scale column_scale + bias + total, over the sums themselves.
struct ScaleSums {
  int64_t rows, columns;
  int32_t* sums;              // (rows, columns) contiguous; y as float32
  const float* row_scale;     // (rows)
  const float* column_scale;  // (columns) or null
  const float* bias;          // (columns) or null
  const float* total;         // (rows, columns) or null
  int64_t total_stride;
};

FASTFT_DECLARE(void int8_product(const Int8Product&))
FASTFT_DECLARE(void scale_sums(const ScaleSums&))

}  // namespace fastft
