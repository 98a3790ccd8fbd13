#include "weighted_rows/kernels.h"
#include "cpu/target_portable.h"

#include "weighted_rows/kernels.inl"

#include "cpu/target_end.h"
