// Everything that simd.inl and a kernel may include from outside. It must come before a target pragma, which would
// otherwise compile the system's inline functions for the wrong CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/types.h"

#if QTS_X86
#include <immintrin.h>
#endif
