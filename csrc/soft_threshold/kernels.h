// Sums over a segment's scores that the soft threshold is solved from, one copy for each instruction set (cpu/isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts {

struct ScoreRange {
  float low, high;
  bool finite;
};

// With s = sigmoid((r - t) / tau): the number of scores above t, the sum of 1 - s over those, the sum of s over the
// others, and the sum of s (1 - s) over all. Every term is at most 1/2, so it is exact to its last digits, and
// sum s = above - missing + present loses nothing where the gates are nearly closed or nearly open.
struct GateSums {
  int64_t above;
  double missing, present, slope;
};

#define QTS_DECLARE(isa)                                                                 \
  namespace isa {                                                                        \
  ScoreRange score_range(const float* scores, int64_t count);                            \
  GateSums gate_sums(const float* scores, int64_t count, double threshold, double tau);  \
  }
QTS_DECLARE(portable)
#if QTS_X86
QTS_DECLARE(avx2)
QTS_DECLARE(avx512)
#endif
#undef QTS_DECLARE

}  // namespace qts
