// What follows in this file is compiled for amx_bf16 whatever the compiler's flags.
// Include it within #if QTS_AMX. See isa.h.
#include "cpu/simd_includes.h"

#define QTS_ISA amx_bf16
#define QTS_LANES 16
#define QTS_AVX512
#define QTS_AVX512_BF16
#define QTS_AMX_BF16
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
// GCC 12's own AVX-512 intrinsics trip this warning (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
