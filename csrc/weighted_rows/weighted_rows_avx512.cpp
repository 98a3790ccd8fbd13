#include "cpu/isa.h"

#if QTS_X86
#include "weighted_rows/kernels.h"
#include "cpu/target_avx512.h"

#include "weighted_rows/kernels.inl"

#include "cpu/target_end.h"
#endif
