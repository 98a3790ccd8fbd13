#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

#if QTS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qts {
namespace {

#if QTS_AMX
// Whether the CPU has the tiles and the system lets this process use them.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best() {
#if QTS_X86
  __builtin_cpu_init();
  // Every CPU with AVX2 and FMA has F16C as well, which older compilers' __builtin_cpu_supports can't name.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#if QTS_AMX
  if (has_amx()) return Isa::amx_bf16;
#endif
  return Isa::avx512_bf16;
#else
  return Isa::portable;
#endif
}

Isa choose() {
  const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
  const Isa has = best();
  const char* asked = std::getenv("QTS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return has;
  for (int i = 0; i < 5; ++i) {
    if (std::string(asked) != names[i]) continue;
    STD_TORCH_CHECK(static_cast<Isa>(i) <= has, "QTS_CPU_ISA asks for ", asked, ", but this CPU has no more than ",
                    names[static_cast<int>(has)]);
    return static_cast<Isa>(i);
  }
  STD_TORCH_CHECK(false, "QTS_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx_bf16, got ", asked);
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace qts
