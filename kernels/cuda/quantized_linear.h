// A linear layer for few rows over a stored weight, with an unmerged low-rank adapter, on CUDA.
#pragma once

#include "../../csrc/quantized_linear.h"
#include "launch.h"

// y, and low where there is an adapter. A plain weight is of x's type, unless x is float32.
FASTFT_CUDA_API fastft::cuda::Failure fastft_quantized_linear(const fastft::QuantizedLinear*,
                                                              fastft::cuda::Stream);
