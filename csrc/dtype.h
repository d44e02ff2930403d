// What kernels take, by name, for code with and without torch, on the host and on GPUs.
#pragma once

namespace fastft {

enum class DType { float32, bfloat16, float16 };

// How a weight is stored: as its elements, or as fastft/ops/quantized_linear.py describes.
enum class WeightLayout { float32, bfloat16, float16, int8, int8_grouped, int4 };

}  // namespace fastft
