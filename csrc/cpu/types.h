// The 16-bit floating types as they lie in memory. simd.inl loads and stores them as float.
#pragma once

#include <cstdint>

namespace qts {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

}  // namespace qts
