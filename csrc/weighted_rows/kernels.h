// A weighted sum of rows, one copy for each instruction set (cpu/isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts {

enum class Element { fp32, bf16, fp16 };

// out[j] = sum over i < count of weights[i] * rows[i][j], added up in fp32 in the order of i and rounded once.
// `type` is that of the rows, `out_type` that of the result, which may be one of the rows where the types are the same.
#define QTS_DECLARE(isa)                                                                                    \
  namespace isa {                                                                                           \
  void weighted_rows(Element type, const void* const* rows, const float* weights, int64_t count,            \
                     int64_t columns, Element out_type, void* out);                                         \
  }
QTS_DECLARE(portable)
#if QTS_X86
QTS_DECLARE(avx2)
QTS_DECLARE(avx512)
#endif
#undef QTS_DECLARE

}  // namespace qts
