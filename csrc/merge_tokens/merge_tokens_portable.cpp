#include "merge_tokens/kernels.h"
#include "cpu/target_portable.h"

#include "merge_tokens/kernels.inl"

#include "cpu/target_end.h"
