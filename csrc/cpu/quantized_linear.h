// A linear layer for few rows over a stored weight, with an unmerged low-rank adapter. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// The storage layouts, described in fastft/ops/quantized_linear.py.
enum class WeightLayout { float32, bfloat16, float16, int8, int8_grouped, int4 };

// A matrix of any of the three types; rows are contiguous, strides in elements.
struct FloatRows {
  const void* data;  // null where there is none
  DType dtype;
  int64_t stride;
};

struct QuantizedLinear {
  int64_t rows, in, out, rank;
  FloatRows x;             // (rows, in)
  WeightLayout layout;
  const void* values;      // (out, in), or (out, in / 2) bytes in int4
  int64_t values_stride;
  const void* scale;       // float32 (out, 1), bfloat16 (out, in / group), or null
  int64_t scale_stride;
  int64_t group;           // 32 or 64 where scales are of groups
  FloatRows bias;          // (out, 1)
  FloatRows a;             // (rank, in)
  FloatRows b;             // (out, rank)
  float lora_scale;
  void* y;                 // (rows, out) contiguous, of x's type
};

FASTFT_DECLARE(void quantized_linear(const QuantizedLinear&))

}  // namespace fastft
