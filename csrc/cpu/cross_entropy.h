// Cross entropy over rows of logits: losses, and gradients from statistics or in place. Torch-free.
#pragma once

#include "isa.h"

namespace fastft {

// Strides are in elements; the innermost dimension is contiguous everywhere.
struct CrossEntropy {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;     // (rows, vocab)
  int64_t logits_stride;
  const int64_t* labels;  // (rows): in [0, vocab) or ignore_index, checked by the caller
  const float* weight;    // (vocab) or null
  double weight_sum;      // vocab without weights
  int64_t ignore_index;
  float label_smoothing;
  float softcap;          // 0: none
  float logit_scale;
  const float* dlosses;   // (rows) upstream gradient, or null for ones
  float* losses;          // (rows)
  float* stats;           // (rows, 2): the row's maximum m and its sum of e^(z - m)
  void* dlogits;          // (rows, vocab), may be the logits themselves
  int64_t dlogits_stride;
};

// losses and stats from the logits.
FASTFT_DECLARE(void cross_entropy_forward(const CrossEntropy&))
// dlogits from the logits and their stats.
FASTFT_DECLARE(void cross_entropy_backward(const CrossEntropy&))
// losses and dlogits, row by row while the row is in the cache; stats are not written.
FASTFT_DECLARE(void cross_entropy_both(const CrossEntropy&))

}  // namespace fastft
