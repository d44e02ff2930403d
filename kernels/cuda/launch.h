// What a launcher is, for the host code that calls it: no CUDA header is needed here.
//
// A launcher is an extern "C" function of plain pointers, sizes and a stream. It checks nothing:
// layouts are the caller's to check, and the header says which are asked for. It returns null, or
// what CUDA says is wrong. Strides are in elements; innermost dimensions are contiguous.
#pragma once

#include <cstdint>

#include "../../csrc/dtype.h"

#define FASTFT_CUDA_API extern "C" __attribute__((visibility("default")))

namespace fastft::cuda {

using Stream = void*;         // cudaStream_t
using Failure = const char*;  // null where nothing failed

}  // namespace fastft::cuda
