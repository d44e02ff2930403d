// A linear layer for few rows over a stored weight, with an unmerged low-rank adapter. Torch-free.
#pragma once

#include "../quantized_linear.h"
#include "isa.h"

namespace fastft {

constexpr int kParts = 4;  // layers that share their rows

FASTFT_DECLARE(void quantized_linear(const QuantizedLinear&))
// Up to kParts layers of the same x and rows, in any layouts.
FASTFT_DECLARE(void quantized_linears(const QuantizedLinear*, int))

// Makes the rows of x instead of a tensor: fill(context, row, out) writes one of `in` floats. It may
// be asked for a row more than once, and by several threads at once where there are up to
// kSharedRows rows.
struct RowSource {
  void (*fill)(const void* context, int64_t row, float* out);
  const void* context;
};
constexpr int64_t kSharedRows = 16;

// quantized_linears inside a parallel region, whose threads all call it and return when all is
// computed, in `room` of as many floats, which they share. With a source, x.data is not read.
FASTFT_DECLARE(int quantized_linears_threads(const QuantizedLinear*, int count))
FASTFT_DECLARE(int64_t quantized_linears_floats(const QuantizedLinear*, int count, int threads))
FASTFT_DECLARE(void shared_quantized_linears(const QuantizedLinear*, int count,
                                             const RowSource* source, float* room))

}  // namespace fastft
