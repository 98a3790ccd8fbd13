// What follows in this file is compiled for avx512 whatever the compiler's flags.
// Include it within #if QTS_X86. See isa.h.
#include "cpu/simd_includes.h"

#define QTS_ISA avx512
#define QTS_LANES 16
#define QTS_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
// GCC 12's own AVX-512 intrinsics trip this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
