#include "cpu/isa.h"

#if QTS_AMX
#include "relevance/kernels.h"
#include "cpu/target_amx_bf16.h"

#include "relevance/kernels.inl"

#include "cpu/target_end.h"
#endif
