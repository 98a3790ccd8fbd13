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

struct Kernels {
  int64_t tile_rows, tile_keys, lanes;
  // 32-bit words that a row takes when it is packed.
  int64_t (*packed_words)(int64_t head_dim);
  // Packs the head_dim elements at `from` as row `row` of a packed query.
  void (*pack_query)(const char* from, int64_t head_dim, int64_t row, uint32_t* packed);
  // Over the keys begin <= m < end: max[r] = the largest score of row r (the lowest float where it sees no key) and
  // sum[r] = sum over m of 2^(s - max). `panel` is scratch of packed_words * tile_keys, `sums` of rows * lanes.
  void (*row_statistics)(const Head&, int64_t begin, int64_t end, uint32_t* panel, float* sums, float* max, float* sum);
  // For the at most tile_keys keys begin <= m < end: best[m] = max(best[m], max over rows of s - lse[r]), and
  // row[m] = first_row + the first row that attains it. Given `row`, NaN stays NaN; without it NaN is passed over.
  void (*column_max)(const Head&, int64_t begin, int64_t end, const float* lse, uint32_t* panel, float* best,
                     int64_t first_row, int64_t* row);
  // total[m] += sum over rows of 2^(s - lse[r]).
  void (*column_sum)(const Head&, int64_t begin, int64_t end, const float* lse, uint32_t* panel, float* total);
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
}  // namespace qts
