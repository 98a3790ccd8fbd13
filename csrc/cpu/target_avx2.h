// What follows in this file is compiled for avx2 whatever the compiler's flags.
// Include it within #if QTS_X86. See isa.h.
#include "cpu/simd_includes.h"

#define QTS_ISA avx2
#define QTS_LANES 8
#define QTS_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
