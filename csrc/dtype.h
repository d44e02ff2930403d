// The element types kernels take, by name, for code with and without torch, on the host and on GPUs.
#pragma once

namespace fastft {

enum class DType { float32, bfloat16, float16 };

}  // namespace fastft
