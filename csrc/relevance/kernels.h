// What a copy of relevance's kernels (one an instruction set) offers to relevance.cpp.
//
// A key head of a segment is a matrix product: its R = G * L query rows (head by head, row r = g * L + l) times the M
// keys. It is computed in tiles of tile_rows x tile_keys scores, never stored. Scores are in base 2, s * log2(e).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts::relevance {

enum class Type { f32, bf16, f16 };

// One key head of one segment.
struct Head {
  const uint32_t* query;   // packed by pack_query
  int64_t rows;            // a multiple of tile_rows; the rows behind R are zeros
  const int32_t* limit;    // [rows] row r sees the keys m < limit[r]; 0 for the rows behind R
  const char* key;         // the segment's first key
  int64_t key_stride;      // bytes from key to key; the elements of a key are contiguous
  const float* key_scale;  // [M] or null
  int64_t head_dim;
  float factor;            // scale * log2(e)
};

constexpr int64_t MAX_TILE_KEYS = 64;

// The best score of each group of group_rows rows and each key, less an estimate of the row's log-sum-exp:
// at[g * stride + m] = max over the rows of group g of s - estimate[r], -inf where they don't see the key.
struct Bounds {
  const float* estimate;  // [rows] finite
  float* at;
  int64_t stride;  // at least the number of keys, rounded up to whole tiles
};

struct Kernels {
  int64_t tile_rows, tile_keys, lanes;
  int64_t group_rows;  // a multiple of tile_rows
  // 32-bit words that a row takes when it is packed.
  int64_t (*packed_words)(int64_t head_dim);
  // Packs the head_dim elements at `from` as row `row` of a packed query.
  void (*pack_query)(const char* from, int64_t head_dim, int64_t row, uint32_t* packed);
  // Over the keys begin <= m < end: max[r] = the largest score of row r (the lowest float where it sees no key) and
  // sum[r] = sum over m of 2^(s - max); and the bounds, unless null, for which begin is a multiple of tile_keys.
  // `panel` is scratch of packed_words * tile_keys words, `running` of 2 * rows * lanes floats.
  void (*row_statistics)(const Head&, int64_t begin, int64_t end, const Bounds*, uint32_t* panel, float* running,
                         float* max, float* sum);
  // For n <= tile_keys keys of ascending index key[i]: best[i] = max(best[i], max over rows of s - lse[r]), and
  // row[i] = first_row + the first row that attains it. Given `row`, NaN stays NaN; without it NaN is passed over.
  void (*column_max)(const Head&, const int32_t* key, int64_t n, const float* lse, uint32_t* panel, float* best,
                     int64_t first_row, int64_t* row);
  // total[i] += sum over rows of 2^(s - lse[r]).
  void (*column_sum)(const Head&, const int32_t* key, int64_t n, const float* lse, uint32_t* panel, float* total);
  // x[i] = 2^x[i]; n is a multiple of tile_keys.
  void (*exp2)(float* x, int64_t n);
};

}  // namespace qts::relevance

namespace qts {
namespace portable {
const relevance::Kernels& relevance_kernels(relevance::Type type);
}
#if QTS_X86
namespace avx2 {
const relevance::Kernels& relevance_kernels(relevance::Type type);
}
namespace avx512 {
const relevance::Kernels& relevance_kernels(relevance::Type type);
}
namespace avx512_bf16 {
const relevance::Kernels& relevance_kernels(relevance::Type type);
}
#endif
#if QTS_AMX
namespace amx_bf16 {
const relevance::Kernels& relevance_kernels();  // of bf16
}
#endif
}  // namespace qts
