// The problem of one call: its segments, and where each keeps its statistics.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "relevance/kernels.h"

namespace qts::relevance {

// The tensors of one call, by address. Strides are in bytes.
struct Input {
  Type type;
  const char *query, *key;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride;
  int64_t query_rows, heads, kv_heads, head_dim;
  const float* key_scale;  // or null
  double scale;
  bool causal;
};

struct Segment {
  int64_t query_begin, length;  // its rows of the packed query axis
  int64_t key_begin, keys;
  int64_t column_begin, columns, out_begin;  // the wanted keys, counted from key_begin, and where their scores go
  int64_t rows;                              // of one key head: group * length, rounded up to whole tiles
  int64_t limit;                             // offset of its rows in Workspace::limit
  int64_t row;                               // offset of its kv_heads * rows in Workspace::lse and ::estimate
  int64_t chunk, chunks;                     // the keys of pass 1, in chunks
  int64_t partial;                           // offset of its kv_heads * chunks * rows in Workspace::max and ::sum
  int64_t groups = 0;                        // of rows in a key head, where pass 1 keeps bounds; else 0
  int64_t bound = 0, bound_stride = 0;       // offset of its kv_heads * groups * bound_stride in Workspace::bound
  // What pass 1 found: a row whose statistic is NaN makes every score NaN; +inf asks for a pass 2 that keeps NaN.
  bool infinite = false;
  int64_t nan_row = -1;  // h * length + l of the first
};

// The lengths of Workspace's buffers.
struct Sizes {
  int64_t limits = 0, rows = 0, partials = 0, bounds = 0;
};

// Everything that is kept between the passes: O(H L (Dh + 64)) numbers whatever M, and the bounds, M H L / 32.
class Workspace {
 public:
  Workspace(const Input& input, const Kernels& kernels, bool mean, const std::vector<Segment>& all);

  // Pass 1: the log-sum-exp of each row; natural logarithms go to lse_out [H, query_rows].
  void row_statistics(float* lse_out);
  // Pass 2: the scores and, unless null, the rows that attain them.
  void column_scores(float* scores, int64_t* argrow) const;

 private:
  struct Columns;  // columns.cpp: some columns of a segment

  Head head(const Segment& segment, int64_t kv_head) const;
  void pack();
  void estimate_rows(const Segment& segment);
  void merge(Segment& segment, float* lse_out);
  void score(const Columns& columns) const;
  void score_every_row(const Columns& columns) const;
  bool score_candidates(const Columns& columns) const;
  double flops() const;

  const Input& in;
  const Kernels& run;
  const bool mean;
  Sizes size;
  std::vector<Segment> segments;  // those with a query and a key
  int64_t words;                  // a packed row's
  Buffer<uint32_t> query;
  Buffer<int32_t> limit;
  Buffer<float> lse;       // base 2; +inf where a row takes no part
  Buffer<float> estimate;  // of lse, for the segments that keep bounds
  Buffer<float> max, sum;  // one entry a chunk of keys and row
  Buffer<float> bound;
};

}  // namespace qts::relevance
