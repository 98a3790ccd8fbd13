#include "reencode/kernels.h"
#include "cpu/target_portable.h"

#include "reencode/kernels.inl"

#include "cpu/target_end.h"
