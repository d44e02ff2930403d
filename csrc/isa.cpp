// Which instruction set this processor has, found once.
#include "cpu/isa.h"

namespace fastft {

Isa best_isa() {
#if defined(FASTFT_X86)
  // cpu_supports also asks whether the operating system saves the wide registers.
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
    return Isa::baseline;
  }();
  return best;
#else
  return Isa::baseline;
#endif
}

namespace {
Isa& current() {
  static Isa isa = best_isa();
  return isa;
}
}  // namespace

Isa isa() { return current(); }

Isa limit_isa(Isa limit) {
  current() = limit < best_isa() ? limit : best_isa();
  return current();
}

}  // namespace fastft
