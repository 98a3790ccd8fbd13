// Exact selection: which key is the last to be kept, and how many of its ties.
//
// A sample gives a bracket that most likely holds the key; one pass counts what lies above the bracket and copies what
// lies inside, among which the search goes on. Where the bracket has missed, the counts say so and a second pass takes
// the side where the key is. Whatever the sample, the result is the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "topn/kernels.h"

namespace qts::topn {

// Room for keys, which have no value until they are written. To grow it loses them.
class Keys {
 public:
  int32_t* room_for(int64_t count) {
    if (count > size_) keys_.reset(new int32_t[static_cast<size_t>(size_ = count)]);
    return get();
  }
  int32_t* get() const { return keys_.get(); }

 private:
  std::unique_ptr<int32_t[]> keys_;
  int64_t size_ = 0;
};

// The candidates of this round, and those of the next.
struct Scratch {
  Keys from, to;
};

// `kept` rows equal to `key` belong to the selection, of `equal` that there are.
struct Threshold {
  int32_t key;
  int64_t kept, equal;
};

// Where the search stands: the threshold, or how many candidates are left and the rank that is sought among them.
struct Search {
  bool found;
  Threshold threshold;
  int64_t left, rank;
};

inline Search found_at(int32_t key, int64_t kept, int64_t equal) { return {true, {key, kept, equal}, 0, 0}; }
inline Search left_with(int64_t left, int64_t rank) { return {false, {}, left, rank}; }

// Bounds about the rank among `count` keys: where the same share of the sample lies, and 2.5 standard deviations to
// each side, which one sample in a hundred misses.
template <class T>
KeyBracket bracket(const T* from, int64_t count, int64_t rank) {
  // A larger sample takes longer, and leaves fewer candidates: measured with AVX-512.
  const int size = count < 1 << 14 ? kRanked : count < 1 << 18 ? 2 * kRanked : kLargestSample;
  const double share = static_cast<double>(rank) / static_cast<double>(count), middle = share * size;
  const double away = 2.5 * std::sqrt(middle * (1.0 - share)) + 0.5;
  const auto low = static_cast<int>(std::ceil(middle + away));
  const auto high = static_cast<int>(std::floor(middle - away));
  KeyBracket b = QTS_DISPATCH(sample_keys, from, count, size, low, high);
  // With nothing between the bounds, take them in.
  if (b.low == b.high) b = {b.low - 1, b.high + 1};
  return b;
}

// One round. split(low, high) makes the keys strictly between them the candidates, and counts those of `high` or more.
template <class F>
Search narrow(const KeyBracket& b, int64_t rank, const F& split) {
  const KeySplit first = split(b.low, b.high);
  if (rank <= first.above) {
    const KeySplit over = split(b.high, kAboveKeys);
    if (rank <= over.inside) return left_with(over.inside, rank);
    return found_at(b.high, rank - over.inside, first.above - over.inside);
  }
  rank -= first.above;
  if (rank <= first.inside) {
    const bool one_key = int64_t{b.high} - b.low == 2;
    return one_key ? found_at(b.low + 1, rank, first.inside) : left_with(first.inside, rank);
  }
  rank -= first.inside;
  const KeySplit under = split(kBelowKeys, b.low);
  const int64_t equal = under.above - first.above - first.inside;
  return rank <= equal ? found_at(b.low, rank, equal) : left_with(under.inside, rank - equal);
}

// Goes on from the first round's outcome; its candidates are in scratch.from, and `before` is how many keys it saw.
inline Threshold finish(Search search, int64_t before, Scratch& scratch) {
  int stalls = 0;
  while (!search.found) {
    const int64_t count = search.left, rank = search.rank;
    int32_t *keys = scratch.from.get(), *to = scratch.to.room_for(count + kSlack);
    const auto split = [&](int32_t low, int32_t high) { return QTS_DISPATCH(split_keys, keys, count, low, high, to); };
    const auto found = [&](int32_t key) {
      const KeySplit ties = split(key - 1, key + 1);
      return Threshold{key, rank - ties.above, ties.inside};
    };
    if (count <= kRanked) return found(QTS_DISPATCH(key_at_rank, keys, count, rank));
    // All rounds but one take off a quarter, or the search ends here: no data makes it slow.
    if (count > before - before / 4 && ++stalls == 2) {
      std::nth_element(keys, keys + rank - 1, keys + count, std::greater<int32_t>());
      return found(keys[rank - 1]);
    }
    search = narrow(bracket(keys, count, rank), rank, split);
    std::swap(scratch.from, scratch.to);
    before = count;
  }
  return search.threshold;
}

// The threshold of the `rank` best of count scores, 0 < rank <= count.
inline Threshold find_threshold(const float* scores, int64_t count, int64_t rank, Scratch& scratch) {
  int32_t* keys = scratch.from.room_for(count + kSlack);
  if (count <= kRanked) {
    QTS_DISPATCH(order_keys, scores, count, keys);
    return finish(left_with(count, rank), count, scratch);
  }
  const auto split = [&](int32_t low, int32_t high) { return QTS_DISPATCH(split_keys, scores, count, low, high, keys); };
  return finish(narrow(bracket(scores, count, rank), rank, split), count, scratch);
}

inline void write_kept(const float* scores, int64_t count, Threshold t, int64_t first_row, int64_t* out) {
  // Where all ties are kept, they need no counting.
  const bool all = t.kept == t.equal;
  QTS_DISPATCH(write_rows, scores, count, all ? t.key - 1 : t.key, all ? 0 : t.kept, first_row, out);
}

}  // namespace qts::topn
