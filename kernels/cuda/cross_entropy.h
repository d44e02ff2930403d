// Cross entropy over rows of logits, on CUDA: the formulas are those of fastft/ops/cross_entropy.py.
#pragma once

#include "launch.h"

namespace fastft::cuda {

struct CrossEntropy {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;  // (rows, vocab)
  int64_t logits_stride;
  const int64_t* labels;  // (rows); one outside the vocabulary gives NaN, never a wild read
  int64_t labels_stride;
  const float* weight;      // (vocab) or null
  const float* weight_sum;  // their sum, one number on the device, or null
  int64_t ignore_index;
  float label_smoothing;
  float softcap;  // 0: none
  float logit_scale;
  const float* dlosses;  // (rows) upstream gradient, or null for ones
  int64_t dlosses_stride;
  float* losses;  // (rows)
  float* stats;   // (rows, 2): the row's maximum m and its sum of e^(z - m)
  void* dlogits;  // (rows, vocab), may be the logits themselves
  int64_t dlogits_stride;
};

}  // namespace fastft::cuda

// losses and stats from the logits: one read.
FASTFT_CUDA_API fastft::cuda::Failure fastft_cross_entropy_forward(
    const fastft::cuda::CrossEntropy*, fastft::cuda::Stream);
// dlogits from the logits and their stats: one read, one write.
FASTFT_CUDA_API fastft::cuda::Failure fastft_cross_entropy_backward(
    const fastft::cuda::CrossEntropy*, fastft::cuda::Stream);
// losses and dlogits: one read, one write. Stats are not written.
FASTFT_CUDA_API fastft::cuda::Failure fastft_cross_entropy_both(const fastft::cuda::CrossEntropy*,
                                                                fastft::cuda::Stream);
