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

// Whether pass 1 shall keep bounds: it pays where there are many keys, wanted ones, and many groups of rows. The last
// group of a head may be part empty, hence three groups at least: the bounds are at most 4.2 % of the score matrix.
bool keeps_bounds(const Segment& s, int64_t kv_heads, int64_t group_rows) {
  return s.keys >= 768 && 2 * s.columns >= s.keys && s.rows >= 3 * group_rows && s.rows * kv_heads >= 8 * group_rows;
}

// Places the segments that have work in the buffers, and drops the others.
std::vector<Segment> placed(const Input& in, const Kernels& run, bool mean, const std::vector<Segment>& all,
                            Sizes& size) {
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
    if (!mean && keeps_bounds(s, in.kv_heads, run.group_rows)) {
      s.groups = (s.rows + run.group_rows - 1) / run.group_rows;
      s.bound = size.bounds;
      s.bound_stride = round_up(s.keys, run.tile_keys);
      size.bounds += in.kv_heads * s.groups * s.bound_stride;
    }
    kept.push_back(s);
  }
  return kept;
}

// log2 of the sum of 2^s over all chunks of keys, from each chunk's maximum and sum, which lie `stride` apart.
double merged(const float* max, const float* sum, int64_t chunks, int64_t stride) {
  float top = max[0];
  for (int64_t c = 1; c < chunks; ++c) top = std::max(top, max[c * stride]);
  double total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += sum[c * stride] * std::exp2(max[c * stride] - top);
  return top + std::log2(total);
}

}  // namespace

Workspace::Workspace(const Input& input, const Kernels& kernels, bool mean_, const std::vector<Segment>& all)
    : in(input),
      run(kernels),
      mean(mean_),
      size(),
      segments(placed(input, kernels, mean_, all, size)),
      words(kernels.packed_words(input.head_dim)),
      query(size.rows * words),
      limit(size.limits),
      lse(size.rows),
      estimate(size.rows),
      max(size.partials),
      sum(size.partials),
      bound(size.bounds) {
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

// The statistics of some thousand keys, evenly spread: what the bounds are taken against. Any number would do for a
// right answer; the nearer it is to the row's log-sum-exp, the fewer rows pass 2 computes.
void Workspace::estimate_rows(const Segment& s) {
  const int64_t step = std::max<int64_t>(16, s.keys / 2048), keys = (s.keys + step - 1) / step;
  const int64_t chunk = round_up(256, run.tile_keys), chunks = (keys + chunk - 1) / chunk;
  Buffer<int32_t> limits(s.rows);
  for (int64_t r = 0; r < s.rows; ++r) limits[r] = static_cast<int32_t>((limit[s.limit + r] + step - 1) / step);
  Buffer<float> key_scale(keys), maxima(in.kv_heads * chunks * s.rows), totals(in.kv_heads * chunks * s.rows);
  if (in.key_scale != nullptr) {
    for (int64_t m = 0; m < keys; ++m) key_scale[m] = in.key_scale[s.key_begin + m * step];
  }
  for_each_item(in.kv_heads * chunks, flops(), [&] {
    return [&, panel = Buffer<uint32_t>(words * run.tile_keys),
            running = Buffer<float>(2 * s.rows * run.lanes)](int64_t i) {
      Head sample = head(s, i / chunks);
      sample.limit = limits.get();
      sample.key_stride *= step;
      if (in.key_scale != nullptr) sample.key_scale = key_scale.get();
      const int64_t begin = i % chunks * chunk, end = std::min(begin + chunk, keys);
      run.row_statistics(sample, begin, end, nullptr, panel.get(), running.get(), maxima.get() + i * s.rows,
                         totals.get() + i * s.rows);
    };
  });
  for (int64_t i = 0; i < in.kv_heads * s.rows; ++i) {
    const int64_t at = i / s.rows * chunks * s.rows + i % s.rows;
    const double found = merged(maxima.get() + at, totals.get() + at, chunks, s.rows) + std::log2(step);
    estimate[s.row + i] = std::isfinite(found) ? static_cast<float>(found) : 0.0f;
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
    if (s.groups > 0) estimate_rows(s);
    rows = std::max(rows, s.rows);
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      for (int64_t kv = 0; kv < in.kv_heads; ++kv) work.push_back({&s, kv, chunk});
    }
  }
  for_each_item(work.size(), flops(), [&] {
    return [&, panel = Buffer<uint32_t>(words * run.tile_keys),
            running = Buffer<float>(2 * rows * run.lanes)](int64_t i) {
      const Segment& s = *work[i].segment;
      const int64_t kv = work[i].kv_head, begin = work[i].chunk * s.chunk, end = std::min(begin + s.chunk, s.keys);
      const int64_t at = s.partial + (kv * s.chunks + work[i].chunk) * s.rows;
      const Bounds bounds{estimate.get() + s.row + kv * s.rows,
                          bound.get() + s.bound + kv * s.groups * s.bound_stride, s.bound_stride};
      run.row_statistics(head(s, kv), begin, end, s.groups > 0 ? &bounds : nullptr, panel.get(), running.get(),
                         max.get() + at, sum.get() + at);
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
      const int64_t at = s.partial + kv * s.chunks * s.rows + r, flat = kv * count + r;
      const double statistic = merged(max.get() + at, sum.get() + at, s.chunks, s.rows);
      lse_out[flat / s.length * in.query_rows + s.query_begin + flat % s.length] = static_cast<float>(statistic * LN_2);
      if (std::isnan(statistic) && s.nan_row < 0) s.nan_row = flat;
      // A row that sees no key, or none but -inf, takes part in nothing.
      if (statistic == -INFINITE) continue;
      base_2[r] = static_cast<float>(statistic);
      s.infinite = s.infinite || base_2[r] == INFINITE;
    }
  }
}

}  // namespace qts::relevance
