#include "cpu/isa.h"

#if QTS_X86
#include "reencode/kernels.h"
#include "cpu/target_avx512.h"

#include "reencode/kernels.inl"

#include "cpu/target_end.h"
#endif
