#include "cpu/isa.h"

#if QTS_X86
#include "topn/kernels.h"
#include "cpu/target_avx2.h"

#include "topn/kernels.inl"

#include "cpu/target_end.h"
#endif
