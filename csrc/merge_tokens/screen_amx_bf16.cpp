#include "cpu/isa.h"

#if QTS_AMX
#include "merge_tokens/screen_kernels.h"
#include "cpu/target_amx_bf16.h"

#include "merge_tokens/screen.inl"

#include "cpu/target_end.h"
#endif
