#include "relevance/segments.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace qts::relevance {
namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// At most 64 chunks, so that the statistics stay small, of at least 768 keys: a row's maximum rises mostly in the first
// hundreds, and each rise is a mispredicted branch (chunks of 256: pass 1 is 4 % slower on a Zen 4). It depends on the
// keys alone: the same numbers are added in the same order on any number of threads.
int64_t chunk_of(int64_t keys, int64_t tile) { return round_up(std::max<int64_t>(768, (keys + 63) / 64), tile); }

// Places the segments that have work in the buffers, and drops the others.
std::vector<Segment> placed(const Input& in, const Kernels& run, const std::vector<Segment>& all, Sizes& size) {
  std::vector<Segment> kept;
  for (Segment s : all) {
    if (s.length == 0 || s.keys == 0) continue;
    s.rows = round_up(in.heads / in.kv_heads * s.length, run.tile_rows);
    s.chunk = chunk_of(s.keys, run.tile_keys);
    s.chunks = (s.keys + s.chunk - 1) / s.chunk;
    s.limit = size.limits;
    s.row = size.rows;
    s.partial = size.partials;
    size.limits += s.rows;
    size.rows += s.rows * in.kv_heads;
    size.partials += s.rows * in.kv_heads * s.chunks;
    kept.push_back(s);
  }
  return kept;
}

}  // namespace

Workspace::Workspace(const Input& input, const Kernels& kernels, const std::vector<Segment>& all)
    : in(input),
      run(kernels),
      size(),
      segments(placed(input, kernels, all, size)),
      words(kernels.packed_words(input.head_dim)),
      query(size.rows * words),
      limit(size.limits),
      lse(size.rows),
      max(size.partials),
      sum(size.partials) {
  pack();
}

Head Workspace::head(const Segment& s, int64_t kv_head) const {
  return {query.get() + (s.row + kv_head * s.rows) * words,
          s.rows,
          limit.get() + s.limit,
          in.key + s.key_begin * in.key_stride + kv_head * in.key_head_stride,
          in.key_stride,
          in.key_scale == nullptr ? nullptr : in.key_scale + s.key_begin,
          in.head_dim,
          static_cast<float>(in.scale * LOG2_E)};
}

double Workspace::flops() const {
  double total = 0;
  for (const Segment& s : segments) total += 2.0 * s.rows * s.keys * in.kv_heads * in.head_dim;
  return total;
}

void Workspace::pack() {
  const int64_t group = in.heads / in.kv_heads;
  for (const Segment& s : segments) {
    for (int64_t r = 0; r < s.rows; ++r) {
      // Row l sees the keys up to l + M - L. The rows behind the last head's see none.
      const int64_t seen = in.causal ? std::max<int64_t>(0, r % s.length + 1 + s.keys - s.length) : s.keys;
      limit[s.limit + r] = static_cast<int32_t>(r < group * s.length ? seen : 0);
    }
    for (int64_t kv = 0; kv < in.kv_heads; ++kv) {
      uint32_t* packed = query.get() + (s.row + kv * s.rows) * words;
      std::fill_n(packed + (s.rows - run.tile_rows) * words, run.tile_rows * words, 0u);
      for (int64_t r = 0; r < group * s.length; ++r) {
        run.pack_query(in.query + (s.query_begin + r % s.length) * in.query_stride +
                           (kv * group + r / s.length) * in.query_head_stride,
                       in.head_dim, r, packed);
      }
    }
  }
}

void Workspace::row_statistics(float* lse_out) {
  struct Work {
    const Segment* segment;
    int64_t kv_head, chunk;
  };
  std::vector<Work> work;
  int64_t rows = 0;
  for (const Segment& s : segments) {
    rows = std::max(rows, s.rows);
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      for (int64_t kv = 0; kv < in.kv_heads; ++kv) work.push_back({&s, kv, chunk});
    }
  }
  for_each_item(work.size(), flops(), [&] {
    return [&, panel = Buffer<uint32_t>(words * run.tile_keys), sums = Buffer<float>(rows * run.lanes)](int64_t i) {
      const Segment& s = *work[i].segment;
      const int64_t begin = work[i].chunk * s.chunk, end = std::min(begin + s.chunk, s.keys);
      const int64_t at = s.partial + (work[i].kv_head * s.chunks + work[i].chunk) * s.rows;
      run.row_statistics(head(s, work[i].kv_head), begin, end, panel.get(), sums.get(), max.get() + at, sum.get() + at);
    };
  });
  for (Segment& s : segments) merge(s, lse_out);
}

void Workspace::merge(Segment& s, float* lse_out) {
  const int64_t count = in.heads / in.kv_heads * s.length;
  for (int64_t kv = 0; kv < in.kv_heads; ++kv) {
    float* const base_2 = lse.get() + s.row + kv * s.rows;
    std::fill_n(base_2, s.rows, INFINITE);
    for (int64_t r = 0; r < count; ++r) {
      const float *m = max.get() + s.partial + kv * s.chunks * s.rows + r, *n = sum.get() + (m - max.get());
      float top = *m;
      for (int64_t c = 1; c < s.chunks; ++c) top = std::max(top, m[c * s.rows]);
      double total = 0;
      for (int64_t c = 0; c < s.chunks; ++c) {
        total += n[c * s.rows] * std::exp2(m[c * s.rows] - top);
      }
      const double statistic = top + std::log2(total);
      const int64_t flat = kv * count + r;
      lse_out[flat / s.length * in.query_rows + s.query_begin + flat % s.length] = static_cast<float>(statistic * LN_2);
      if (std::isnan(statistic) && s.nan_row < 0) s.nan_row = flat;
      // A row that sees no key, or none but -inf, takes part in nothing.
      if (statistic == -INFINITE) continue;
      base_2[r] = static_cast<float>(statistic);
      s.infinite = s.infinite || base_2[r] == INFINITE;
    }
  }
}

void Workspace::column_scores(bool mean, float* scores, int64_t* argrow) const {
  struct Work {
    const Segment* segment;
    int64_t begin;
  };
  std::vector<Work> work;
  for (const Segment& s : segments) {
    for (int64_t c = 0; c < s.columns; c += run.tile_keys) work.push_back({&s, c});
  }
  for_each_item(work.size(), flops(), [&] {
    return [&, panel = Buffer<uint32_t>(words * run.tile_keys)](int64_t i) {
      const Segment& s = *work[i].segment;
      panel_scores(s, work[i].begin, mean, panel.get(), scores + s.out_begin + work[i].begin,
                   argrow == nullptr ? nullptr : argrow + s.out_begin + work[i].begin);
    };
  });
}

void Workspace::panel_scores(const Segment& s, int64_t begin, bool mean, uint32_t* panel, float* scores,
                             int64_t* argrow) const {
  const int64_t n = std::min(run.tile_keys, s.columns - begin);
  const int64_t key = s.column_begin + begin;
  const auto attained_by = [&](int64_t flat) {
    return flat / s.length * in.query_rows + s.query_begin + flat % s.length;
  };
  if (s.nan_row >= 0) {
    std::fill_n(scores, n, std::numeric_limits<float>::quiet_NaN());
    if (argrow != nullptr) std::fill_n(argrow, n, attained_by(s.nan_row));
    return;
  }
  alignas(64) float value[MAX_TILE_KEYS];
  int64_t row[MAX_TILE_KEYS] = {};
  std::fill_n(value, run.tile_keys, mean ? 0.0f : -INFINITE);
  const int64_t count = in.heads / in.kv_heads * s.length;
  for (int64_t kv = 0; kv < in.kv_heads; ++kv) {
    const float* const base_2 = lse.get() + s.row + kv * s.rows;
    if (mean) {
      run.column_sum(head(s, kv), key, key + n, base_2, panel, value);
    } else {
      run.column_max(head(s, kv), key, key + n, base_2, panel, value, kv * count,
                     argrow != nullptr || s.infinite ? row : nullptr);
    }
  }
  if (mean) {
    for (int64_t m = 0; m < n; ++m) scores[m] = value[m] / static_cast<float>(in.heads * s.length);
    return;
  }
  run.exp2(value, run.tile_keys);
  std::copy_n(value, n, scores);
  if (argrow != nullptr) std::transform(row, row + n, argrow, attained_by);
}

}  // namespace qts::relevance
