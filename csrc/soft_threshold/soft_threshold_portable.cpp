#include "soft_threshold/kernels.h"
#include "cpu/target_portable.h"

#include "soft_threshold/kernels.inl"

#include "cpu/target_end.h"
