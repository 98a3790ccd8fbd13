// What follows is compiled for the compiler's baseline: 16-byte vectors, which x86-64 and AArch64 both have. See isa.h.
#include "cpu/simd_includes.h"

#define QTS_ISA portable
#define QTS_LANES 4
