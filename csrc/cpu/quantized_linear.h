// A linear layer for few rows over a stored weight, with an unmerged low-rank adapter. Torch-free.
#pragma once

#include "../quantized_linear.h"
#include "isa.h"

namespace fastft {

constexpr int kParts = 4;  // layers that share their rows

FASTFT_DECLARE(void quantized_linear(const QuantizedLinear&))
// Up to kParts layers of the same x and rows, in any layouts.
FASTFT_DECLARE(void quantized_linears(const QuantizedLinear*, int))

}  // namespace fastft
