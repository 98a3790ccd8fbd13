// Segmented Top-n on the CPU: exact, in ascending index order, the same bits for any number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <tuple>

#include "topn/select.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace qts::topn;

// Below this a histogram costs more to clear than the keys cost to order.
constexpr int64_t kTiny = 32;
constexpr int64_t kSmall = 512;
// From this size on, the threads share one segment; below it, they share the segments. 100,000 rows take .4 ms of one
// thread; meeting the others four times saves half of that where cores are free, and costs milliseconds where not.
constexpr int64_t kLarge = 1 << 18;
constexpr int64_t kRowsAPart = 1 << 15;

struct Segment {
  int64_t start, stop, count, out;
};

void keep_all(const Segment& s, int64_t* out) { std::iota(out + s.out, out + s.out + s.count, s.start); }

// Key and row in one word, the lower row above: all words differ, so the count-th largest is a threshold without ties.
void select_small(const float* scores, const Segment& s, int64_t* out) {
  uint64_t words[kSmall], sorted[kSmall];
  const int64_t length = s.stop - s.start;
  int64_t* end = out + s.out;
  for (int64_t i = 0; i < length; ++i)
    words[i] = uint64_t{ordered_key(scores[s.start + i])} << 32 | static_cast<uint32_t>(~i);
  if (length <= kTiny) {
    for (int64_t i = 0; i < length; ++i) {
      int64_t rank = 0;
      for (int64_t j = 0; j < length; ++j) rank += words[j] > words[i];
      if (rank < s.count) *end++ = s.start + i;
    }
    return;
  }
  std::copy(words, words + length, sorted);
  std::nth_element(sorted, sorted + s.count - 1, sorted + length, std::greater<uint64_t>());
  const uint64_t last = sorted[s.count - 1];
  for (int64_t i = 0; i < length; ++i)
    if (words[i] >= last) *end++ = s.start + i;
}

// The digit of the `wanted`-th largest key, all parts together. `wanted` becomes its rank among the keys of that digit.
uint32_t find_digit(std::vector<Part>& parts, uint32_t bins, int64_t& wanted) {
  uint32_t digit = bins;
  int64_t here = 0;
  while (digit-- > 0) {
    here = 0;
    for (const Part& part : parts) here += part.histogram.count(digit);
    if (here >= wanted) break;
    wanted -= here;
  }
  return digit;
}

void count_above(std::vector<Part>& parts, uint32_t digit, uint32_t bins) {
  for (Part& part : parts)
    for (uint32_t d = digit + 1; d < bins; ++d) part.above += part.histogram.count(d);
}

// `each(f)` runs f on every part: in this thread, or in parallel.
template <class Each>
void select_radix(const float* scores, const Segment& s, int64_t* out, std::vector<Part>& parts, const Each& each) {
  int64_t wanted = s.count;
  for (Part& part : parts) part.above = 0;
  each([&](Part& part) { part.count_first(scores); });
  const uint32_t first = find_digit(parts, kMask[0] + 1, wanted);
  count_above(parts, first, kMask[0] + 1);
  each([&](Part& part) { part.count_second(scores, first); });
  const uint32_t second = find_digit(parts, kMask[1] + 1, wanted);
  count_above(parts, second, kMask[1] + 1);
  each([&](Part& part) { part.count_third(first, second); });
  const uint32_t third = find_digit(parts, kMask[2] + 1, wanted);
  count_above(parts, third, kMask[2] + 1);

  const uint32_t threshold = first << kShift[0] | second << kShift[1] | third;
  // The first `wanted` ties are kept: a part knows how many stand before it, so it knows where to write.
  int64_t before = 0, position = s.out;
  std::vector<int64_t> ties, positions;
  for (const Part& part : parts) {
    const int64_t here = part.histogram.count(third);
    ties.push_back(std::clamp<int64_t>(wanted - before, 0, here));
    positions.push_back(position);
    position += part.above + ties.back();
    before += here;
  }
  each([&](Part& part) {
    const auto index = static_cast<size_t>(&part - parts.data());
    write_rows(scores, part.start, part.stop, threshold, ties[index], out + positions[index]);
  });
}

void select_serial(const float* scores, const Segment& s, int64_t* out, std::vector<Part>& scratch) {
  const int64_t length = s.stop - s.start;
  if (s.count == 0) return;
  if (s.count == length) return keep_all(s, out);
  if (length <= kSmall) return select_small(scores, s, out);
  scratch.resize(1);
  scratch[0].start = s.start;
  scratch[0].stop = s.stop;
  select_radix(scores, s, out, scratch, [&](const auto& f) { f(scratch[0]); });
}

void select_parallel(const float* scores, const Segment& s, int64_t* out) {
  if (s.count == 0) return;
  if (s.count == s.stop - s.start) return keep_all(s, out);
  const int64_t length = s.stop - s.start;
  const int64_t count = std::min<int64_t>(torch::stable::get_num_threads(), (length + kRowsAPart - 1) / kRowsAPart);
  std::vector<Part> parts(static_cast<size_t>(std::max<int64_t>(count, 1)));
  for (int64_t i = 0; i < count; ++i) {
    parts[static_cast<size_t>(i)].start = s.start + length * i / count;
    parts[static_cast<size_t>(i)].stop = s.start + length * (i + 1) / count;
  }
  select_radix(scores, s, out, parts, [&](const auto& f) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(parts[static_cast<size_t>(i)]);
    });
  });
}

std::tuple<Tensor, Tensor> topn(Tensor scores, Tensor cu_seqlens, Tensor n, int64_t max_n) {
  scores = torch::stable::contiguous(scores);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  n = torch::stable::contiguous(n);
  STD_TORCH_CHECK(cu_seqlens.numel() == n.numel() + 1, "n must have one entry a segment, got ", n.numel(), " for ",
                  cu_seqlens.numel() - 1, " segments");
  const float* score = scores.const_data_ptr<float>();
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t* wanted = n.const_data_ptr<int64_t>();
  const int64_t segments = n.numel(), total = scores.numel(), rows = std::min(segments * max_n, total);

  Tensor indices = torch::stable::new_empty(scores, {rows}, ScalarType::Long);
  Tensor cu_out = torch::stable::empty_like(cu_seqlens);
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  int32_t* out_offsets = cu_out.mutable_data_ptr<int32_t>();

  std::vector<Segment> plan(static_cast<size_t>(segments));
  int64_t kept = 0;
  out_offsets[0] = 0;
  for (int64_t i = 0; i < segments; ++i) {
    const int64_t start = offsets[i], stop = offsets[i + 1];
    STD_TORCH_CHECK(0 <= start && start <= stop && stop <= total, "cu_seqlens must rise from 0 to ", total, ", got ",
                    start, " before ", stop);
    const int64_t count = std::clamp<int64_t>(wanted[i], 0, std::min(max_n, stop - start));
    plan[static_cast<size_t>(i)] = {start, stop, count, kept};
    kept += count;
    out_offsets[i + 1] = static_cast<int32_t>(kept);
  }
  std::fill(out + kept, out + rows, int64_t{-1});

  for (const Segment& s : plan)
    if (s.stop - s.start >= kLarge) select_parallel(score, s, out);
  // The others: a thread takes the segments that start in its share of the rows, so that ragged ones balance.
  const int64_t shares = std::clamp<int64_t>(total / kRowsAPart, 1, segments);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const auto first_at = [&](int64_t share) {
      if (share == shares) return plan.end();
      const auto before = [](const Segment& s, int64_t row) { return s.start < row; };
      return std::lower_bound(plan.begin(), plan.end(), total * share / shares, before);
    };
    std::vector<Part> scratch;
    for (auto s = first_at(begin), last = first_at(end); s != last; ++s)
      if (s->stop - s->start < kLarge) select_serial(score, *s, out, scratch);
  });
  return {indices, cu_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("topn", TORCH_BOX(&topn)); }
