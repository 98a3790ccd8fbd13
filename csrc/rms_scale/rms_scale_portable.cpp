#include "rms_scale/kernels.h"
#include "cpu/target_portable.h"

#include "rms_scale/kernels.inl"

#include "cpu/target_end.h"
