// Instruction sets. Every file csrc/cpu/*.cpp is compiled once per set, inside the namespace
// FASTFT_ISA; the host picks the best set the processor has, once, at run time.
#pragma once

#include <cstdint>

#include "../dtype.h"

#if defined(FASTFT_X86)
#define FASTFT_DECLARE(...)             \
  namespace baseline { __VA_ARGS__; }   \
  namespace avx2 { __VA_ARGS__; }       \
  namespace avx512 { __VA_ARGS__; }     \
  namespace avx512vnni { __VA_ARGS__; }
#define FASTFT_DISPATCH(call)                                \
  (fastft::isa() == fastft::Isa::avx512vnni ? avx512vnni::call \
   : fastft::isa() == fastft::Isa::avx512   ? avx512::call     \
   : fastft::isa() == fastft::Isa::avx2     ? avx2::call       \
                                            : baseline::call)
#else
#define FASTFT_DECLARE(...) namespace baseline { __VA_ARGS__; }
#define FASTFT_DISPATCH(call) (baseline::call)
#endif

namespace fastft {

enum class Isa { baseline, avx2, avx512, avx512vnni };

// The set in use: the best one of this processor, or the one `limit_isa` allows.
Isa isa();
// The best set of this processor.
Isa best_isa();
// Tests run every set the processor has through this; returns the set now in use.
Isa limit_isa(Isa limit);

// A parallel region pays for itself only above this many elements of work.
constexpr int64_t kGrain = 16384;

}  // namespace fastft
