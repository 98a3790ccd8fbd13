// Sums over gates. Included after cpu/target_<isa>.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {

struct GateVectors {
  VecI above = {};
  Vec missing = {}, present = {}, slope = {};
};

// The threshold and the factor log2(e) / tau, each as a float and what that float leaves out.
struct GatePoint {
  float threshold, threshold_rest, factor, factor_rest;
};

QTS_INLINE void add_gates(GateVectors& sums, Vec r, const GatePoint& at) {
  // r - t with its rounding error (Knuth's two-sum), since t is wanted to the last bit of fp32 whatever tau.
  const Vec t = broadcast(at.threshold);
  const Vec d = r - t;
  const Vec back = d - r;
  const Vec rest = ((r - (d - back)) - (t + back)) - at.threshold_rest;
  const VecI above = d > 0.0f;
  const Vec distance = select(above, d, -d), distance_rest = select(above, rest, -rest);
  // Beyond 2^-200 a gate is closed. NaN arises where d overflows, and means the same: vmin then gives the bound.
  const Vec correction = fma(distance, broadcast(at.factor_rest), distance_rest * at.factor);
  const Vec exponent = vmax(broadcast(0.0f), vmin(fma(distance, broadcast(at.factor), correction), broadcast(200.0f)));
  const Vec e = exp2(-exponent);
  const Vec gate = e / (1.0f + e);
  sums.above -= above;
  sums.missing += select(above, gate, Vec{});
  sums.present += select(above, Vec{}, gate);
  sums.slope = fma(-gate, gate, sums.slope + gate);
}

QTS_INLINE void collect(const GateVectors& sums, GateSums& total) {
  for (int i = 0; i < LANES; ++i) {
    total.above += sums.above[i];
    total.missing += (double)sums.missing[i];
    total.present += (double)sums.present[i];
    total.slope += (double)sums.slope[i];
  }
}

QTS_INLINE float finite_or(float x, float other) { return x - x == 0.0f ? x : other; }

}  // namespace

ScoreRange score_range(const float* scores, int64_t count) {
  Vec low = broadcast(scores[0]), high = low, difference = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vec r = load(scores + i);
    low = vmin(r, low);
    high = vmax(r, high);
    difference += r - r;  // 0 where finite, else NaN
  }
  float least = low[0], most = high[0], bad = 0.0f;
  for (int j = 0; j < LANES; ++j) {
    least = low[j] < least ? low[j] : least;
    most = high[j] > most ? high[j] : most;
    bad += difference[j];
  }
  for (; i < count; ++i) {
    least = scores[i] < least ? scores[i] : least;
    most = scores[i] > most ? scores[i] : most;
    bad += scores[i] - scores[i];
  }
  return {least, most, bad == 0.0f};
}

GateSums gate_sums(const float* scores, int64_t count, double threshold, double tau) {
  const double factor = 1.4426950408889634 / tau, largest = 0x1p120;
  GatePoint at;
  at.threshold = (float)threshold;
  at.threshold_rest = finite_or((float)(threshold - (double)at.threshold), 0.0f);
  at.factor = (float)(factor < largest ? factor : largest);
  at.factor_rest = factor < largest ? (float)(factor - (double)at.factor) : 0.0f;

  GateSums total = {0, 0.0, 0.0, 0.0};
  // A lane adds few terms in fp32 before they go on in fp64, so the sums keep the terms' precision.
  constexpr int64_t run = 16 * LANES;
  int64_t i = 0;
  while (i + LANES <= count) {
    const int64_t stop = i + run < count ? i + run : count;
    GateVectors sums;
    for (; i + LANES <= stop; i += LANES) add_gates(sums, load(scores + i), at);
    collect(sums, total);
  }
  if (i < count) {
    // Padded with scores far below the threshold, whose gates are closed and add nothing.
    float tail[LANES];
    for (int j = 0; j < LANES; ++j) tail[j] = i + j < count ? scores[i + j] : -__builtin_inff();
    GateVectors sums;
    add_gates(sums, load(tail), at);
    collect(sums, total);
  }
  return total;
}

}  // namespace qts::QTS_ISA
