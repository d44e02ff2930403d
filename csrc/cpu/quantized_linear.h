// A linear layer for few rows over a stored weight, with an unmerged low-rank adapter. Torch-free.
#pragma once

#include "../quantized_linear.h"
#include "isa.h"

namespace fastft {

FASTFT_DECLARE(void quantized_linear(const QuantizedLinear&))

}  // namespace fastft
