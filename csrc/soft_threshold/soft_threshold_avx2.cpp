#include "cpu/isa.h"

#if QTS_X86
#include "soft_threshold/kernels.h"
#include "cpu/target_avx2.h"

#include "soft_threshold/kernels.inl"

#include "cpu/target_end.h"
#endif
