// Dot products of rows, one copy for each instruction set (cpu/isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts {

// out[i * columns_b + j] = <a[i], b[j]> for fp32 rows of `columns`. Every product is added up in the same order, so
// that equal rows have equal products. dot_pairs: out[i] = <a[i], b[i]>, the same bits.
#define QTS_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                         \
  void dot_rows(const float* const* a, int64_t count_a, const float* const* b, int64_t count_b,           \
                int64_t columns, float* out);                                                             \
  void dot_pairs(const float* const* a, const float* const* b, int64_t count, int64_t columns,            \
                 float* out);                                                                             \
  }
QTS_DECLARE(portable)
#if QTS_X86
QTS_DECLARE(avx2)
QTS_DECLARE(avx512)
#endif
#undef QTS_DECLARE

}  // namespace qts
