// Half rotation of queries and keys by the angles of their tokens. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// Strides are in elements; the innermost dimension is contiguous everywhere.
struct Rotated {
  int64_t heads;
  const void* x;  // (batch, tokens, heads, head_dim), in any order of memory
  int64_t x_batch, x_token, x_head;
  void* y;        // the same shape
  int64_t y_batch, y_token, y_head;
};

// With a = angle of the first half, b = of the second: y1 = x1 cos_a - sign x2 sin_low,
// y2 = x2 cos_b + sign x1 sin_high. Forward has sin_low = sin_a, sin_high = sin_b and sign 1; its
// transpose, the backward, swaps the two and turns the sign.
struct Rotary {
  DType dtype, angle_dtype;  // angle_dtype is dtype or float32
  int64_t batch, tokens, head_dim, half;
  Rotated parts[2];          // queries and keys, or only one of them
  int count;
  const void* cos;           // (batch or 1, tokens, 2 half)
  const void* sin;
  int64_t cos_batch, cos_token, sin_batch, sin_token;
  bool transposed;
};

FASTFT_DECLARE(void rotary(const Rotary&))
// One of batch * tokens rows, by the calling thread.
FASTFT_DECLARE(void rotary_row(const Rotary&, int64_t row))

}  // namespace fastft
