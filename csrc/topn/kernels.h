// What selects rows by their scores, one copy for each instruction set (cpu/isa.h).
//
// A score becomes a key, an int32 that sorts as the score does: NaN lowest, then -inf, then up to +inf; -0 equals +0.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts {

// Outside of all keys: below NaN's and above +inf's.
constexpr int32_t kBelowKeys = INT32_MIN, kAboveKeys = INT32_MAX;
// So few keys are ranked by comparing each with each. A sample is no larger than kLargestSample.
constexpr int kRanked = 64, kLargestSample = 256;
// split_keys writes whole vectors: what it writes to has room for so many keys more than it counts.
constexpr int kSlack = 16;

// Keys of `high` or more, and keys strictly between `low` and `high`.
struct KeySplit {
  int64_t above, inside;
};

struct KeyBracket {
  int32_t low, high;
};

// split_keys: counts keys and writes those inside to `to`, in order.
// sample_keys: the keys at two ranks (1 is the largest) of a sample of `size` out of count >= size keys, `size` being a
// power of two, kRanked or more; where `high` is below 1 or `low` above `size`, the bound outside of all keys.
// key_at_rank: the key at `rank` among count <= kRanked keys.
// write_rows: writes first_row + i for the keys i above `threshold` and the first `ties` equal to it.
#define QTS_DECLARE(isa)                                                                                        \
  namespace isa {                                                                                               \
  void order_keys(const float* scores, int64_t count, int32_t* keys);                                           \
  KeySplit split_keys(const float* scores, int64_t count, int32_t low, int32_t high, int32_t* to);              \
  KeySplit split_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to);              \
  KeyBracket sample_keys(const float* scores, int64_t count, int size, int low, int high);                      \
  KeyBracket sample_keys(const int32_t* keys, int64_t count, int size, int low, int high);                      \
  int32_t key_at_rank(int32_t* keys, int64_t count, int64_t rank);                                              \
  void write_rows(const float* scores, int64_t count, int32_t threshold, int64_t ties, int64_t first_row,       \
                  int64_t* out);                                                                                \
  }
QTS_DECLARE(portable)
#if QTS_X86
QTS_DECLARE(avx2)
QTS_DECLARE(avx512)
#endif
#undef QTS_DECLARE

}  // namespace qts
