// Pass 2: the score of each key.
//
// score[m] = 2^v[m], v[m] = max over rows of s - lse[r]. Where pass 1 kept bounds, few rows need computing again: for
// group g, u = max over its rows of s - estimate, so max over its rows of s - lse lies in [u - d_max, u - d_min] with
// d = lse - estimate. A group whose upper end is below another's lower end is no candidate for the key. With random
// data 1 to 2 groups in 16 are left, and pass 2 takes a fifth of its time.

#include <algorithm>
#include <cmath>
#include <limits>

#include "relevance/segments.h"

namespace qts::relevance {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
// Columns that are scored together where candidates are sought, so that most panels of candidates are full.
constexpr int64_t BLOCK = 1536;
// u, v and d are differences rounded to nearest; this covers their errors four times over.
constexpr float SLACK = 0x1p-20f;

}  // namespace

// The columns [begin, begin + count) of a segment's wanted ones, at most BLOCK.
struct Workspace::Columns {
  const Segment& segment;
  int64_t begin, count;
  uint32_t* panel;   // scratch
  float* value;      // [count rounded up to whole tiles]
  int64_t* row;      // likewise; h * length + l; null where it isn't needed
  int32_t* list;     // scratch, [2 * BLOCK]
  float* threshold;  // scratch, [BLOCK]
};

void Workspace::column_scores(float* scores, int64_t* argrow) const {
  struct Work {
    const Segment* segment;
    int64_t begin, count;
  };
  std::vector<Work> work;
  for (const Segment& s : segments) {
    const int64_t block = s.groups > 0 ? BLOCK : run.tile_keys;
    for (int64_t c = 0; c < s.columns; c += block) work.push_back({&s, c, std::min(block, s.columns - c)});
  }
  const int64_t most = size.bounds > 0 ? BLOCK + MAX_TILE_KEYS : MAX_TILE_KEYS;
  for_each_item(work.size(), flops(), [&] {
    return [&, panel = Buffer<uint32_t>(words * run.tile_keys), value = Buffer<float>(most),
            row = Buffer<int64_t>(most), list = Buffer<int32_t>(2 * most), threshold = Buffer<float>(most)](int64_t i) {
      const Segment& s = *work[i].segment;
      const int64_t n = work[i].count, out = s.out_begin + work[i].begin;
      const bool rows = argrow != nullptr || s.infinite;
      score({s, work[i].begin, n, panel.get(), value.get(), rows ? row.get() : nullptr, list.get(), threshold.get()});
      std::copy_n(value.get(), n, scores + out);
      if (argrow == nullptr) return;
      std::transform(row.get(), row.get() + n, argrow + out, [&](int64_t flat) {
        return flat / s.length * in.query_rows + s.query_begin + flat % s.length;
      });
    };
  });
}

void Workspace::score(const Columns& c) const {
  const Segment& s = c.segment;
  const int64_t padded = (c.count + run.tile_keys - 1) / run.tile_keys * run.tile_keys;
  if (c.row != nullptr) std::fill_n(c.row, padded, s.nan_row >= 0 ? s.nan_row : 0);
  if (s.nan_row >= 0) {
    std::fill_n(c.value, padded, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  std::fill_n(c.value, padded, mean ? 0.0f : -INFINITE);
  if (s.groups == 0 || s.infinite || !score_candidates(c)) score_every_row(c);
  if (!mean) {
    run.exp2(c.value, padded);
    return;
  }
  for (int64_t m = 0; m < c.count; ++m) c.value[m] /= static_cast<float>(in.heads * s.length);
}

void Workspace::score_every_row(const Columns& c) const {
  const Segment& s = c.segment;
  const int64_t count = in.heads / in.kv_heads * s.length;
  for (int64_t begin = 0; begin < c.count; begin += run.tile_keys) {
    const int64_t n = std::min(run.tile_keys, c.count - begin);
    for (int64_t i = 0; i < n; ++i) c.list[i] = static_cast<int32_t>(s.column_begin + c.begin + begin + i);
    for (int64_t kv = 0; kv < in.kv_heads; ++kv) {
      const float* const base_2 = lse.get() + s.row + kv * s.rows;
      if (mean) {
        run.column_sum(head(s, kv), c.list, n, base_2, c.panel, c.value + begin);
      } else {
        run.column_max(head(s, kv), c.list, n, base_2, c.panel, c.value + begin, kv * count,
                       c.row == nullptr ? nullptr : c.row + begin);
      }
    }
  }
}

// False, and nothing done, where so many groups are candidates that every row is the quicker way.
bool Workspace::score_candidates(const Columns& c) const {
  const Segment& s = c.segment;
  const int64_t key = s.column_begin + c.begin, count = in.heads / in.kv_heads * s.length;
  const int64_t groups = in.kv_heads * s.groups;
  struct Group {
    const float* u;
    float low, high;  // of lse - estimate over its rows
    float slack;
  };
  std::vector<Group> group(groups);
  std::fill_n(c.threshold, c.count, -INFINITE);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = s.row + g / s.groups * s.rows + g % s.groups * run.group_rows;
    const int64_t rows = std::min(run.group_rows, s.rows - g % s.groups * run.group_rows);
    Group& at = group[g];
    at = {bound.get() + s.bound + g * s.bound_stride + key, INFINITE, -INFINITE, 0};
    for (int64_t r = first; r < first + rows; ++r) {
      if (lse[r] == INFINITE) continue;
      at.low = std::min(at.low, lse[r] - estimate[r]);
      at.high = std::max(at.high, lse[r] - estimate[r]);
    }
    at.slack = SLACK * std::max(std::fabs(at.low), std::fabs(at.high));
    if (at.low > at.high) continue;  // no row takes part
    for (int64_t m = 0; m < c.count; ++m) {
      const float lower = at.u[m] - at.high - (SLACK * std::fabs(at.u[m]) + at.slack);
      c.threshold[m] = lower > c.threshold[m] ? lower : c.threshold[m];
    }
  }
  // Two passes over the bounds, to count and to list, cost less than keeping a list for each group.
  const auto is_candidate = [&](const Group& at, int64_t m) {
    return at.u[m] - at.low + (SLACK * std::fabs(at.u[m]) + at.slack) >= c.threshold[m];  // NaN, hence no, for -inf
  };
  int64_t candidates = 0;
  for (const Group& at : group) {
    if (at.low > at.high) continue;
    int32_t here = 0;
    for (int64_t m = 0; m < c.count; ++m) here += is_candidate(at, m);
    candidates += here;
  }
  if (3 * candidates > groups * c.count) return false;
  for (int64_t g = 0; g < groups; ++g) {
    const Group& at = group[g];
    if (at.low > at.high) continue;
    int64_t listed = 0;
    for (int64_t m = 0; m < c.count; ++m) {
      c.list[listed] = static_cast<int32_t>(m);
      listed += is_candidate(at, m);
    }
    const int64_t kv = g / s.groups, first = g % s.groups * run.group_rows;
    Head part = head(s, kv);
    part.query += first * words;
    part.limit += first;
    part.rows = std::min(run.group_rows, s.rows - first);
    for (int64_t begin = 0; begin < listed; begin += run.tile_keys) {
      const int64_t n = std::min(run.tile_keys, listed - begin);
      alignas(64) float value[MAX_TILE_KEYS] = {};
      int64_t row[MAX_TILE_KEYS] = {};
      int32_t keys[MAX_TILE_KEYS];
      for (int64_t i = 0; i < n; ++i) {
        const int32_t m = c.list[begin + i];
        keys[i] = static_cast<int32_t>(key + m);
        value[i] = c.value[m];
        row[i] = c.row == nullptr ? 0 : c.row[m];
      }
      run.column_max(part, keys, n, lse.get() + s.row + kv * s.rows + first, c.panel, value, kv * count + first,
                     c.row == nullptr ? nullptr : row);
      for (int64_t i = 0; i < n; ++i) {
        const int32_t m = c.list[begin + i];
        c.value[m] = value[i];
        if (c.row != nullptr) c.row[m] = row[i];
      }
    }
  }
  return true;
}

}  // namespace qts::relevance
