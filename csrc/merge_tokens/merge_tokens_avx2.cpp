#include "cpu/isa.h"

#if QTS_X86
#include "merge_tokens/kernels.h"
#include "cpu/target_avx2.h"

#include "merge_tokens/kernels.inl"

#include "cpu/target_end.h"
#endif
