// What the kernels of quantized_linear take, on the CPU and on GPUs; fastft/ops/quantized_linear.py
// has the formula and the storage layouts. Torch-free.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastft {

// A matrix of any of the three types; rows are contiguous, strides in elements.
struct FloatRows {
  const void* data;  // null where there is none
  DType dtype;
  int64_t stride;
};

struct QuantizedLinear {
  int64_t rows, in, out, rank;
  FloatRows x;  // (rows, in)
  WeightLayout layout;
  const void* values;  // (out, in), or (out, in / 2) bytes in int4
  int64_t values_stride;
  const void* scale;  // float32 (out, 1), bfloat16 (out, in / group), or null
  int64_t scale_stride;
  int64_t group;   // 32 or 64 where scales are of groups, else 0
  FloatRows bias;  // (out, 1)
  FloatRows a;     // (rank, in)
  FloatRows b;     // (out, rank)
  float lora_scale;
  void* y;     // (rows, out), of x's type
  float* low;  // (rows, rank), on GPUs: where x A^T goes
  // Only on the CPU; on GPUs y is contiguous.
  int64_t y_stride;
  bool transposed;  // values are (in, out), rows contiguous, of a floating-point type
  bool onto;        // no weight: y holds the product already and the adapter is added to it
  bool round_inputs;  // to int8 numbers with a scale per run, before an int8 or int4 weight
};

}  // namespace fastft
