#include "cpu/isa.h"

#if QTS_X86
#include "rms_scale/kernels.h"
#include "cpu/target_avx2.h"

#include "rms_scale/kernels.inl"

#include "cpu/target_end.h"
#endif
