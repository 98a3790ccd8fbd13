#include "cpu/isa.h"

#if QTS_X86
#include "relevance/kernels.h"
#include "cpu/target_avx512_bf16.h"

#include "relevance/kernels.inl"

#include "cpu/target_end.h"
#endif
