// Rounding of rows to int8 before a product of integers, and the columns that stay out of it;
// fastft/ops/int8_linear.py has the formulas. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// Rows of any of the three types, times `columns` where there is one, as int8 with a scale each.
struct RoundRows {
  DType dtype;
  int64_t rows, columns;
  const void* x;  // rows contiguous
  int64_t stride;
  const float* factors;  // (columns) or null
  int8_t* values;        // (rows, columns) contiguous
  float* scale;          // (rows)
  int64_t count;         // columns to be copied as well
  const int64_t* chosen;
  float* apart;          // (rows, count) contiguous
};

// Largest size of each column; one with NaN has any.
struct ColumnPeaks {
  DType dtype;
  int64_t rows, columns;
  const void* x;  // rows contiguous
  int64_t stride;
  float* peaks;  // (columns)
};

// Chosen columns of an int8 weight as float32, one after the other.
struct Int8Columns {
  int64_t out, count;
  const int8_t* values;  // (out, in), rows contiguous
  int64_t stride;
  const float* scale;  // (out)
  const int64_t* chosen;
  float* y;  // (count, out) contiguous
};

FASTFT_DECLARE(void round_rows(const RoundRows&))
FASTFT_DECLARE(void column_peaks(const ColumnPeaks&))
FASTFT_DECLARE(void int8_columns(const Int8Columns&))

}  // namespace fastft
