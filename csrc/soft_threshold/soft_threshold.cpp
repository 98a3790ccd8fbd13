// The soft threshold on the CPU: a bracketed Newton iteration for sum sigmoid((r - t) / tau) = rho M.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "soft_threshold/kernels.h"

namespace {

using torch::stable::Tensor;

// Sums are cut here whatever the number of threads, so that their bits do not depend on it.
constexpr int64_t kChunk = 1 << 14;
// From this size on, the threads share one segment; below it, they share the segments: a dozen meetings of the threads
// cost more than they save where other work has the cores.
constexpr int64_t kLarge = 1 << 18;
// Halving alone brings any bracket of floats from its whole range to the last bit in this many steps.
constexpr int kIterations = 100;

// f(chunk) for each chunk of a segment, and the results in their order.
template <class Result, class F>
std::vector<Result> each_chunk(int64_t count, bool parallel, const F& f) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<Result> results(static_cast<size_t>(chunks));
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      results[static_cast<size_t>(c)] = f(c * kChunk, std::min(kChunk, count - c * kChunk));
  };
  if (parallel) {
    torch::stable::parallel_for(0, chunks, 1, work);
  } else {
    work(0, chunks);
  }
  return results;
}

// NaN where a score is not finite: no threshold separates what has no size.
float solve(const float* scores, int64_t count, double rho, double tau, bool parallel) {
  constexpr float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  if (count == 0) return 0.0f;
  if (!(rho > 0.0 && rho < 1.0)) return rho <= 0.0 ? infinity : rho >= 1.0 ? -infinity : nan;
  qts::ScoreRange range = {scores[0], scores[0], true};
  for (const qts::ScoreRange& r : each_chunk<qts::ScoreRange>(count, parallel, [&](int64_t start, int64_t size) {
         return QTS_DISPATCH(score_range, scores + start, size);
       })) {
    range = {std::min(range.low, r.low), std::max(range.high, r.high), range.finite && r.finite};
  }
  if (!range.finite) return nan;

  // With t = min(r) - tau logit(rho) every term is at least rho, with max(r) at most: the root lies between.
  const double shift = tau * std::log(rho / (1.0 - rho));
  double low = range.low - shift, high = range.high - shift;
  const double target = rho * static_cast<double>(count), target_closed = (1.0 - rho) * static_cast<double>(count);
  double t = low + (high - low) / 2, last_step = high - low, step_before = last_step;
  for (int i = 0; i < kIterations && low < high; ++i) {
    qts::GateSums sums = {0, 0.0, 0.0, 0.0};
    for (const qts::GateSums& s : each_chunk<qts::GateSums>(count, parallel, [&](int64_t start, int64_t size) {
           return QTS_DISPATCH(gate_sums, scores + start, size, t, tau);
         })) {
      sums.above += s.above;
      sums.missing += s.missing;
      sums.present += s.present;
      sums.slope += s.slope;
    }
    const double excess = (static_cast<double>(sums.above) - target) + (sums.present - sums.missing);
    if (excess == 0.0) break;
    (excess > 0.0 ? low : high) = t;
    // Newton on the logarithm of the smaller side, open or closed: the gates' tails are exponentials, so it is nearly
    // a straight line. Where it leaves the bracket, or gains less than halving would, the bracket is halved.
    const double open = target + excess, closed = target_closed - excess;
    double step = (target < target_closed ? std::log1p(excess / target) * open
                                          : -std::log1p(-excess / target_closed) * closed) *
                  (tau / sums.slope);
    const double next = t + step;
    if (!(next > low && next < high) || std::abs(step) > std::abs(step_before) / 2) {
      step = low + (high - low) / 2 - t;
    }
    step_before = last_step;
    last_step = step;
    t += step;
    // A quarter of fp32's last bit, or what the rounding of the gates makes of t.
    if (std::abs(step) <= std::max(0x1p-26 * std::abs(t), 1e-8 * tau)) break;
  }
  return static_cast<float>(t);
}

Tensor soft_threshold(Tensor scores, Tensor rho, Tensor cu_seqlens, double tau) {
  scores = torch::stable::contiguous(scores);
  rho = torch::stable::contiguous(rho);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  const int64_t segments = rho.numel(), total = scores.numel();
  STD_TORCH_CHECK(cu_seqlens.numel() == segments + 1, "rho must have one entry a segment, got ", segments, " for ",
                  cu_seqlens.numel() - 1, " segments");
  const float* score = scores.const_data_ptr<float>();
  const float* share = rho.const_data_ptr<float>();
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < segments; ++s)
    STD_TORCH_CHECK(0 <= offsets[s] && offsets[s] <= offsets[s + 1] && offsets[s + 1] <= total,
                    "cu_seqlens must rise from 0 to ", total, ", got ", offsets[s], " before ", offsets[s + 1]);
  Tensor out = torch::stable::empty_like(rho);
  float* t = out.mutable_data_ptr<float>();

  const auto size = [&](int64_t s) { return int64_t{offsets[s + 1]} - offsets[s]; };
  for (int64_t s = 0; s < segments; ++s)
    if (size(s) >= kLarge) t[s] = solve(score + offsets[s], size(s), share[s], tau, true);
  const int64_t grain = std::max<int64_t>(1, kChunk * segments / std::max<int64_t>(total, 1) / 8);
  torch::stable::parallel_for(0, segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      if (size(s) < kLarge) t[s] = solve(score + offsets[s], size(s), share[s], tau, false);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("soft_threshold", TORCH_BOX(&soft_threshold)); }
