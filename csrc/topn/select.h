// Exact selection by radix: which key is the last to be kept, and how many of its ties.
//
// A score becomes a 32-bit key that sorts as the score does: NaN lowest, then -inf, then up to +inf; -0 equals +0. A
// row is kept when its key is above the threshold, or equal to it and among the first ties. Nothing here is bounded by
// a guess: every buffer has the size that a count has given.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace qts::topn {

constexpr int kBlock = 1024;
// Three digits of a key, most significant first: 2048 counters are 8 KiB, which stays in the first-level cache.
constexpr int kBins = 2048;
constexpr int kShift[3] = {21, 10, 0};
constexpr uint32_t kMask[3] = {0x7ff, 0x7ff, 0x3ff};

inline uint32_t ordered_key(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return magnitude > 0x7f800000u ? 0u : magnitude == 0u ? 0x80000000u : key;
}

inline uint32_t ordered_key(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return ordered_key(bits);
}

// The loop is kept apart from the counting so that the compiler makes it a vector loop.
inline void ordered_keys(const float* scores, int count, uint32_t* keys) {
  for (int i = 0; i < count; ++i) keys[i] = ordered_key(scores[i]);
}

// One digit's histogram. Neighbouring scores often fall into one bin, so four counters a bin keep the additions from
// waiting for one another.
class Histogram {
 public:
  Histogram() : counters_(new uint32_t[4 * kBins]) { clear(); }
  void clear() { std::memset(counters_.get(), 0, sizeof(uint32_t) * 4 * kBins); }
  void add(uint32_t digit, int lane) { ++counters_[4 * digit + lane]; }
  int64_t count(uint32_t digit) const {
    const uint32_t* c = &counters_[4 * digit];
    return int64_t{c[0]} + c[1] + c[2] + c[3];
  }

 private:
  std::unique_ptr<uint32_t[]> counters_;
};

// A stretch of a segment's rows, which one thread counts and writes.
struct Part {
  int64_t start, stop;
  Histogram histogram;
  std::vector<uint32_t> candidates;  // keys that share the threshold's first digit
  int64_t above = 0;                 // rows above the threshold

  void count_first(const float* scores) {
    histogram.clear();
    each_block(scores, [&](const uint32_t* keys, int count) {
      for (int i = 0; i < count; ++i) histogram.add(keys[i] >> kShift[0], i & 3);
    });
  }

  void count_second(const float* scores, uint32_t first) {
    // One more than the count: the loop below writes every key, and moves on where the key belongs.
    candidates.resize(static_cast<size_t>(histogram.count(first)) + 1);
    histogram.clear();
    uint32_t* end = candidates.data();
    each_block(scores, [&](const uint32_t* keys, int count) {
      for (int i = 0; i < count; ++i) {
        *end = keys[i];
        end += keys[i] >> kShift[0] == first;
      }
    });
    candidates.resize(static_cast<size_t>(end - candidates.data()));
    for (size_t i = 0; i < candidates.size(); ++i)
      histogram.add(candidates[i] >> kShift[1] & kMask[1], static_cast<int>(i & 3));
  }

  void count_third(uint32_t first, uint32_t second) {
    histogram.clear();
    const uint32_t prefix = first << (kShift[0] - kShift[1]) | second;
    int lane = 0;
    for (const uint32_t key : candidates)
      if (key >> kShift[1] == prefix) histogram.add(key & kMask[2], lane++ & 3);
  }

  template <class F>
  void each_block(const float* scores, F&& use) const {
    uint32_t keys[kBlock];
    for (int64_t i = start; i < stop; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, stop - i));
      ordered_keys(scores + i, count, keys);
      use(keys, count);
    }
  }
};

// Writes the kept rows of [start, stop) in ascending order: those above `threshold`, and the first `ties` equal to it.
inline void write_rows(
    const float* scores, int64_t start, int64_t stop, uint32_t threshold, int64_t ties, int64_t* out) {
  uint32_t keys[kBlock];
  int64_t rows[kBlock];
  for (int64_t i = start; i < stop; i += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, stop - i));
    ordered_keys(scores + i, count, keys);
    int kept = 0;
    for (int j = 0; j < count; ++j) {
      // Written always, kept sometimes: a branch on a random score would be mispredicted.
      rows[kept] = i + j;
      const bool tie = (keys[j] == threshold) & (ties > 0);
      ties -= tie;
      kept += (keys[j] > threshold) | tie;
    }
    std::memcpy(out, rows, sizeof(int64_t) * static_cast<size_t>(kept));
    out += kept;
  }
}

}  // namespace qts::topn
