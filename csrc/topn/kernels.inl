// Selection by keys. Included after cpu/target_<isa>.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {

constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kNaN = -kInfinity - 1;
// Rows are found a group of vectors at a time, and written a block at a time.
constexpr int GROUP = 4;
constexpr int64_t BLOCK = 512;

QTS_INLINE VecI broadcast(int32_t x) { return x + VecI{}; }

// Integer operations alone, since a thread may be set to take subnormal floats for zeros.
QTS_INLINE VecI ordered(VecI bits) {
  const VecI key = bits < 0 ? (VecI)(0x80000000u - (VecU)bits) : bits;
  return (bits & 0x7fffffff) > kInfinity ? broadcast(kNaN) : key;
}

QTS_INLINE VecI load_keys(const float* from) { return ordered(load_as<VecI>(from)); }
QTS_INLINE VecI load_keys(const int32_t* from) { return load_as<VecI>(from); }

// Of the first n < LANES elements; behind them what is below every key.
template <typename T>
QTS_INLINE VecI load_keys_part(const T* from, int64_t n) {
  T padded[LANES] = {};
  __builtin_memcpy(padded, from, n * sizeof(T));
  return lane_index() < (int32_t)n ? load_keys(padded) : broadcast(kBelowKeys);
}

#if defined(QTS_AVX512)
typedef __mmask16 Mask;
QTS_INLINE Mask greater(VecI a, VecI b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
QTS_INLINE bool any(Mask mask) { return mask != 0; }
QTS_INLINE int count_of(Mask mask) { return __builtin_popcount(mask); }
#elif defined(QTS_AVX2)
typedef uint32_t Mask;
QTS_INLINE Mask greater(VecI a, VecI b) {
  return (Mask)_mm256_movemask_ps((__m256)_mm256_cmpgt_epi32((__m256i)a, (__m256i)b));
}
QTS_INLINE bool any(Mask mask) { return mask != 0; }
QTS_INLINE int count_of(Mask mask) { return __builtin_popcount(mask); }

// For each mask the lanes that it has, in order.
struct LaneTable {
  uint8_t lanes[256][8] = {};
  constexpr LaneTable() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, end = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][end++] = (uint8_t)lane;
      }
    }
  }
};
constexpr LaneTable kLaneTable;
#else
typedef VecI Mask;
QTS_INLINE Mask greater(VecI a, VecI b) { return a > b; }
QTS_INLINE bool any(Mask mask) {
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= mask[i];
  return all != 0;
}
#endif

// Writes the lanes that the mask has, and what follows up to a whole vector; returns the end of the former.
QTS_INLINE int32_t* compress(int32_t* to, VecI x, Mask mask) {
#if defined(QTS_AVX512)
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)x));
  return to + count_of(mask);
#elif defined(QTS_AVX2)
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)kLaneTable.lanes[mask]));
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32((__m256i)x, lanes));
  return to + count_of(mask);
#else
  for (int i = 0; i < LANES; ++i) {
    *to = x[i];
    to -= mask[i];
  }
  return to;
#endif
}

QTS_INLINE int64_t sum_lanes(VecI x) {
  int64_t total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

// Calls use(keys, i) with the keys from i on, a vector at a time; the last is filled up with what is below every key.
template <typename T, typename F>
QTS_INLINE void each_vector(const T* from, int64_t count, const F& use) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) use(load_keys(from + i), i);
  if (i < count) use(load_keys_part(from + i, count - i), i);
}

template <typename T>
QTS_INLINE KeySplit split(const T* from, int64_t count, int32_t low, int32_t high, int32_t* to) {
  const VecI below = broadcast(low), outside = broadcast(high - 1);
  int32_t* end = to;
  VecI above = {};
  each_vector(from, count, [&](VecI key, int64_t) {
    above -= key > outside;
    end = compress(end, key, greater(key, below) & ~greater(key, outside));
  });
  return {sum_lanes(above), end - to};
}

// For each of `count` keys how many of them are above it. Both arrays have room for whole vectors.
QTS_INLINE void count_above(int32_t* keys, int64_t count, int32_t* above) {
  for (int64_t i = count; i % LANES; ++i) keys[i] = kBelowKeys;
  for (int64_t i = 0; i < count; i += LANES) {
    const VecI key = load_keys(keys + i);
    VecI sum = {};
    for (int64_t j = 0; j < count; ++j) sum -= broadcast(keys[j]) > key;
    __builtin_memcpy(above + i, &sum, sizeof(sum));
  }
}

// The key at `rank`: the least of those that have fewer than `rank` above them.
QTS_INLINE int32_t least_at(const int32_t* keys, const int32_t* above, int64_t count, int64_t rank) {
  VecI least = broadcast(kAboveKeys);
  for (int64_t i = 0; i < count; i += LANES) {
    const VecI key = load_keys(keys + i);
    least = (load_keys(above + i) < (int32_t)rank) & (key < least) ? key : least;
  }
  int32_t first = least[0];
  for (int i = 1; i < LANES; ++i) first = least[i] < first ? least[i] : first;
  return first;
}

QTS_INLINE uint64_t hash(uint64_t i) {
  i *= 0x9e3779b97f4a7c15u;
  return (i ^ i >> 29) * 0xbf58476d1ce4e5b9u;
}

// One row from each of `size` stretches of equal length, at a place that a hash chooses: a pattern in the data is as
// good as chance, and the same rows are drawn on every run. tests/ops/test_topn.py repeats it, to mislead it.
template <typename T>
QTS_INLINE KeyBracket sample(const T* from, int64_t count, int size, int low, int high) {
  T drawn[kLargestSample];
  int32_t keys[kLargestSample], above[kLargestSample];
  const uint64_t length = (uint64_t)count;
  const int shift = __builtin_ctz((unsigned)size);
  for (int i = 0; i < size; ++i) drawn[i] = from[(i * length + ((hash(i) >> 33) * length >> 31)) >> shift];
  for (int i = 0; i < size; i += LANES) {
    const VecI key = load_keys(drawn + i);
    __builtin_memcpy(keys + i, &key, sizeof(key));
  }
  count_above(keys, size, above);
  return {low > size ? kBelowKeys : least_at(keys, above, size, low),
          high < 1 ? kAboveKeys : least_at(keys, above, size, high)};
}

// Writes first_row + i for the rows i above `threshold`; returns the end.
QTS_INLINE int64_t* write_above(
    const float* scores, int64_t count, int32_t threshold, int64_t first_row, int64_t* out) {
  int32_t rows[BLOCK + LANES];
  int32_t* end = rows;
  const VecI limit = broadcast(threshold);
  int64_t i = 0;
  for (; i + GROUP * LANES <= count; i += GROUP * LANES) {
    Mask kept[GROUP];
    for (int j = 0; j < GROUP; ++j) kept[j] = greater(load_keys(scores + i + j * LANES), limit);
    if (!any(kept[0] | kept[1] | kept[2] | kept[3])) continue;
    for (int j = 0; j < GROUP; ++j) end = compress(end, lane_index() + (int32_t)(i + j * LANES), kept[j]);
  }
  each_vector(scores + i, count - i, [&](VecI key, int64_t j) {
    end = compress(end, lane_index() + (int32_t)(i + j), greater(key, limit));
  });
  for (const int32_t* row = rows; row != end; ++row) *out++ = first_row + *row;
  return out;
}

QTS_INLINE int32_t ordered_one(float score) {
  const VecI key = load_keys_part(&score, 1);
  return key[0];
}

QTS_INLINE int64_t count_equal(const float* scores, int64_t count, int32_t threshold) {
  VecI sum = {};
  each_vector(scores, count, [&](VecI key, int64_t) { sum -= key == threshold; });
  return sum_lanes(sum);
}

}  // namespace

void order_keys(const float* scores, int64_t count, int32_t* keys) {
  each_vector(scores, count, [&](VecI key, int64_t i) { __builtin_memcpy(keys + i, &key, sizeof(key)); });
}

KeySplit split_keys(const float* scores, int64_t count, int32_t low, int32_t high, int32_t* to) {
  return split(scores, count, low, high, to);
}

KeySplit split_keys(const int32_t* keys, int64_t count, int32_t low, int32_t high, int32_t* to) {
  return split(keys, count, low, high, to);
}

KeyBracket sample_keys(const float* scores, int64_t count, int size, int low, int high) {
  return sample(scores, count, size, low, high);
}

KeyBracket sample_keys(const int32_t* keys, int64_t count, int size, int low, int high) {
  return sample(keys, count, size, low, high);
}

int32_t key_at_rank(int32_t* keys, int64_t count, int64_t rank) {
  int32_t above[kRanked];
  count_above(keys, count, above);
  return least_at(keys, above, count, rank);
}

void write_rows(const float* scores, int64_t count, int32_t threshold, int64_t ties, int64_t first_row, int64_t* out) {
  for (int64_t i = 0, stop; i < count; i = stop) {
    stop = i + BLOCK < count ? i + BLOCK : count;
    int32_t limit = threshold;
    if (ties > 0) {
      const int64_t equal = count_equal(scores + i, stop - i, threshold);
      limit = threshold - 1;
      if (equal <= ties) {
        ties -= equal;
      } else {  // the ties end in this block
        for (stop = i; ties > 0; ++stop) ties -= ordered_one(scores[stop]) == threshold;
      }
    }
    out = write_above(scores + i, stop - i, limit, first_row + i, out);
  }
}

}  // namespace qts::QTS_ISA
