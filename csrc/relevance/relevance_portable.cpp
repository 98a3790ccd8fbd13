#include "relevance/kernels.h"
#include "cpu/target_portable.h"

#include "relevance/kernels.inl"

#include "cpu/target_end.h"
