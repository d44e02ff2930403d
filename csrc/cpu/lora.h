// The three products of a low-rank adapter that are too thin for a GEMM library, where `matrix` is
// the wide side (tokens, columns) and the rank is small. Each reads the wide side once. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// Strides are in elements. With a mask, `matrix` stands for matrix * mask * keep_scale (dropout).
struct LowRank {
  DType dtype;             // of matrix
  int64_t rows, columns, rank;
  void* matrix;            // (rows, columns), rows contiguous; written by `add` only
  int64_t matrix_stride;
  const uint8_t* mask;     // (rows, columns) contiguous, or null
  float keep_scale;
  float scale;
  const float* narrow;     // (rows, rank): read by `sum` and `add`
  int64_t narrow_stride;
  const float* wide;       // (rank, columns): read by `dot` and `add`
  float* out;              // (rows, rank) for `dot`, (rank, columns) for `sum`
};

// out = scale * matrix wide^T
FASTFT_DECLARE(void low_rank_dot(const LowRank&))
// out = scale * narrow^T matrix
FASTFT_DECLARE(void low_rank_sum(const LowRank&))
// matrix += scale * narrow wide, the added part times mask * keep_scale
FASTFT_DECLARE(void low_rank_add(const LowRank&))

}  // namespace fastft
