// What each element of a resampled axis is made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace qts::resize_frames {

// Element i of the axis is the sum over k of weights[start[i] + k] times element index[start[i] + k] of the other.
struct Taps {
  std::vector<int64_t> start = {0}, index;
  std::vector<float> weights;

  void add(int64_t i, float weight) {
    index.push_back(i);
    weights.push_back(weight);
  }
  void close() { start.push_back(static_cast<int64_t>(index.size())); }
  int64_t size() const { return static_cast<int64_t>(start.size()) - 1; }
};

// The position (i + 1/2) in / out - 1/2 of F.interpolate, as a fraction with the denominator 2 out: no rounding.
inline Taps bilinear_taps(int64_t in, int64_t out) {
  Taps taps;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t position = std::max<int64_t>((2 * i + 1) * in - out, 0), low = position / (2 * out);
    const float weight = static_cast<float>(position % (2 * out)) / static_cast<float>(2 * out);
    taps.add(low, low + 1 < in ? 1.0f - weight : 1.0f);
    if (low + 1 < in && weight > 0.0f) taps.add(low + 1, weight);
    taps.close();
  }
  return taps;
}

inline Taps average_taps(int64_t in, int64_t out) {
  Taps taps;
  for (int64_t i = 0; i < out; ++i) {
    const int64_t first = i * in / out, last = ((i + 1) * in + out - 1) / out;
    for (int64_t k = first; k < last; ++k) taps.add(k, 1.0f / static_cast<float>(last - first));
    taps.close();
  }
  return taps;
}

// torch.linspace(0, in - 1, out) in float, cut to integers. The products of floats are taken in double, where they are
// exact, so that no compiler can keep them unrounded.
inline Taps linspace_taps(int64_t in, int64_t out) {
  Taps taps;
  const double end = static_cast<double>(in - 1);
  const auto step = static_cast<float>(end / static_cast<double>(std::max<int64_t>(out - 1, 1)));
  for (int64_t i = 0; i < out; ++i) {
    const bool first_half = i < out / 2 || out == 1;
    const auto offset = static_cast<float>(double{step} * static_cast<double>(first_half ? i : out - 1 - i));
    const float position = first_half ? offset : static_cast<float>(end - double{offset});
    taps.add(static_cast<int64_t>(position), 1.0f);
    taps.close();
  }
  return taps;
}

// The taps of the transposed map: what each of the `in` elements gives its gradient to.
inline Taps transposed(const Taps& taps, int64_t in) {
  std::vector<std::vector<std::pair<int64_t, float>>> to(static_cast<size_t>(in));
  for (int64_t i = 0; i < taps.size(); ++i)
    for (int64_t k = taps.start[i]; k < taps.start[i + 1]; ++k)
      to[static_cast<size_t>(taps.index[k])].emplace_back(i, taps.weights[k]);
  Taps out;
  for (const auto& element : to) {
    for (const auto& [i, weight] : element) out.add(i, weight);
    out.close();
  }
  return out;
}

}  // namespace qts::resize_frames
