// Which instruction set this processor has, found once.
#include "cpu/isa.h"

#if defined(FASTFT_X86)
#include <cpuid.h>
#endif

namespace fastft {

#if defined(FASTFT_X86)
namespace {
// A virtual machine may hide it; not every compiler's cpu_supports knows the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
}  // namespace
#endif

Isa best_isa() {
#if defined(FASTFT_X86)
  // cpu_supports also asks whether the operating system saves the wide registers.
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
      return Isa::avx2;
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
