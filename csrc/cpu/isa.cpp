#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace qts {
namespace {

Isa best() {
#if QTS_X86
  __builtin_cpu_init();
  // Every CPU with AVX2 and FMA has F16C as well, which older compilers' __builtin_cpu_supports can't name.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

Isa choose() {
  const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  const Isa has = best();
  const char* asked = std::getenv("QTS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return has;
  for (int i = 0; i < 4; ++i) {
    if (std::string(asked) != names[i]) continue;
    STD_TORCH_CHECK(static_cast<Isa>(i) <= has, "QTS_CPU_ISA asks for ", asked, ", but this CPU has no more than ",
                    names[static_cast<int>(has)]);
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "QTS_CPU_ISA must be portable, avx2, avx512 or avx512_bf16, got ", asked);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace qts
