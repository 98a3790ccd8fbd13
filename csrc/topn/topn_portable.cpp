#include "topn/kernels.h"
#include "cpu/target_portable.h"

#include "topn/kernels.inl"

#include "cpu/target_end.h"
