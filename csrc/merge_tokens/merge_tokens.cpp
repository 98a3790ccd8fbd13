// Repeated bipartite soft matching on the CPU: a thread takes a frame. See qts_kernels/ops/merge_tokens/reference.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/parallel.h"
#include "gather_tokens/rows.h"
#include "merge_tokens/kernels.h"
#include "merge_tokens/screen.h"
#include "weighted_rows/element.h"
#include "weighted_rows/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using qts::Element;

struct Shape {
  int64_t tokens, columns;
  Element type;
  int64_t row_bytes;
  bool compat;
};

// What the frames of a thread share.
struct Scratch {
  explicit Scratch(const Shape& shape)
      : vectors(shape.type == Element::fp32 ? 0 : shape.tokens * shape.columns),
        means(shape.tokens / 2 * shape.columns) {
    const auto bytes = static_cast<int64_t>(sizeof(float)) * shape.columns;
    qts::advise_huge_pages(means.get(), shape.tokens / 2 * bytes);
    if (shape.type != Element::fp32) qts::advise_huge_pages(vectors.get(), shape.tokens * bytes);
    if (qts::screen_kernels() && shape.tokens / 2 >= qts::Screen::kFewest)
      screen.emplace((shape.tokens + 1) / 2, shape.columns);
  }

  qts::Buffer<float> vectors, means;
  std::optional<qts::Screen> screen;
  std::vector<float> dots;
};

// The tokens of one frame as they are merged. A cluster is known by the token that the others came to.
class Frame {
 public:
  Frame(const Shape& shape, Scratch& scratch, const char* x, const float* sizes)
      : shape_(shape), scratch_(scratch), x_(x), sizes_(sizes), screened_(scratch.screen.has_value()),
        alive_(size()), root_(size()), vectors_(size()), share_(size(), 1.0f), weight_(size()),
        inverse_norm_(size()), measured_(size()) {
    std::iota(alive_.begin(), alive_.end(), 0);
    std::iota(root_.begin(), root_.end(), 0);
    for (size_t i = 0; i < size(); ++i) weight_[i] = sizes ? sizes[i] : 1.0f;
  }

  void merge(int64_t count) {
    while (static_cast<int64_t>(alive_.size()) > count) {
      const auto n = static_cast<int64_t>(alive_.size()), merged = std::min(n / 2, n - count);
      round(static_cast<size_t>(merged), n - merged > count);
    }
    if (!shape_.compat)
      for (size_t i = 0; i < size(); ++i) share_[i] = (sizes_ ? sizes_[i] : 1.0f) / weight_[root_[i]];
  }

  // The first `kept` clusters into the rows from `start` on.
  void write(int64_t start, int64_t kept, char* tokens, float* sizes, int64_t* rows, float* shares) const {
    std::vector<int64_t> slot(size(), -1);
    for (int64_t k = 0; k < kept; ++k) slot[alive_[static_cast<size_t>(k)]] = k;
    std::vector<std::vector<size_t>> members(static_cast<size_t>(kept));
    for (size_t i = 0; i < size(); ++i) {
      const int64_t k = slot[root_[i]];
      rows[i] = k < 0 ? -1 : start + k;
      shares[i] = k < 0 ? 0.0f : share_[i];
      if (k >= 0) members[static_cast<size_t>(k)].push_back(i);
    }
    std::vector<const void*> from;
    std::vector<float> weights;
    for (size_t k = 0; k < members.size(); ++k) {
      from.clear();
      weights.clear();
      float whole = 0.0f;
      for (const size_t i : members[k]) {
        from.push_back(row(i));
        weights.push_back(share_[i]);
        whole += sizes_ ? sizes_[i] : 1.0f;
      }
      sizes[start + static_cast<int64_t>(k)] = whole;
      QTS_DISPATCH(weighted_rows, shape_.type, from.data(), weights.data(), static_cast<int64_t>(from.size()),
                   shape_.columns, shape_.type, tokens + (start + static_cast<int64_t>(k)) * shape_.row_bytes);
    }
  }

 private:
  size_t size() const { return static_cast<size_t>(shape_.tokens); }
  const char* row(size_t i) const { return x_ + static_cast<int64_t>(i) * shape_.row_bytes; }

  // Sees to it that these tokens have their fp32 vectors, the frame's own or converted, and their inverse norms.
  void prepare(const size_t* tokens, size_t count) {
    const float one = 1.0f;
    std::vector<size_t> fresh;
    std::vector<const float*> rows;
    for (size_t k = 0; k < count; ++k) {
      const size_t i = tokens[k];
      if (measured_[i]) continue;
      measured_[i] = true;
      if (vectors_[i] == nullptr && shape_.type == Element::fp32) {
        vectors_[i] = reinterpret_cast<const float*>(row(i));
      } else if (vectors_[i] == nullptr) {
        const void* from = row(i);
        float* to = scratch_.vectors.get() + static_cast<int64_t>(i) * shape_.columns;
        QTS_DISPATCH(weighted_rows, shape_.type, &from, &one, 1, shape_.columns, Element::fp32, to);
        vectors_[i] = to;
      }
      fresh.push_back(i);
      rows.push_back(vectors_[i]);
    }
    std::vector<float> squares(fresh.size());
    QTS_DISPATCH(dot_pairs, rows.data(), rows.data(), static_cast<int64_t>(rows.size()), shape_.columns,
                 squares.data());
    for (size_t k = 0; k < fresh.size(); ++k)
      inverse_norm_[fresh[k]] = squares[k] == 0.0f ? 0.0f : 1.0f / std::sqrt(squares[k]);
  }

  void round(size_t merged, bool another) {
    std::vector<size_t> even, odd;
    for (size_t k = 0; k < alive_.size(); ++k) (k % 2 ? odd : even).push_back(alive_[k]);
    std::vector<size_t> best(even.size());
    std::vector<float> similarity(even.size());
    match(even, odd, best, similarity);

    std::vector<size_t> order(even.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return similarity[i] > similarity[j]; });
    std::vector<std::vector<size_t>> guests(odd.size());
    std::vector<bool> gone(size());
    std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(merged));  // guests in the frame's order
    for (size_t k = 0; k < merged; ++k) {
      guests[best[order[k]]].push_back(even[order[k]]);
      gone[even[order[k]]] = true;
    }
    join(odd, guests, another);

    std::vector<size_t> left;
    if (shape_.compat) {
      for (size_t k = merged; k < order.size(); ++k) left.push_back(even[order[k]]);
      left.insert(left.end(), odd.begin(), odd.end());
    } else {
      for (const size_t i : alive_)
        if (!gone[i]) left.push_back(i);
    }
    alive_ = std::move(left);
  }

  // The most similar odd token of each even one. NaN is the smallest similarity; the first of equal ones counts.
  void match(const std::vector<size_t>& even, const std::vector<size_t>& odd, std::vector<size_t>& best,
             std::vector<float>& similarity) {
    std::fill(similarity.begin(), similarity.end(), -std::numeric_limits<float>::infinity());
    std::vector<size_t> some(even.size());
    std::iota(some.begin(), some.end(), 0);
    if (screened_ && static_cast<int64_t>(odd.size()) >= qts::Screen::kFewest) {
      some = match_screened(even, odd, best, similarity);
      // Tokens as alike as these are so in the next round too.
      screened_ = 2 * some.size() <= even.size();
    } else {
      prepare(alive_.data(), alive_.size());
    }
    std::vector<const float*> a, b;
    for (const size_t i : some) a.push_back(vectors_[even[i]]);
    for (const size_t j : odd) b.push_back(vectors_[j]);
    scratch_.dots.resize(a.size() * b.size());
    const float* dot = scratch_.dots.data();
    QTS_DISPATCH(dot_rows, a.data(), static_cast<int64_t>(a.size()), b.data(), static_cast<int64_t>(b.size()),
                 shape_.columns, scratch_.dots.data());
    for (const size_t i : some)
      for (size_t j = 0; j < odd.size(); ++j) take(*dot++, even, odd, i, j, best, similarity);
  }

  void take(float dot, const std::vector<size_t>& even, const std::vector<size_t>& odd, size_t i, size_t j,
            std::vector<size_t>& best, std::vector<float>& similarity) {
    const float s = dot * inverse_norm_[even[i]] * inverse_norm_[odd[j]];
    if (s > similarity[i]) {
      similarity[i] = s;
      best[i] = j;
    }
  }

  // Matches the even tokens of few candidates; those that are left are returned.
  std::vector<size_t> match_screened(const std::vector<size_t>& even, const std::vector<size_t>& odd,
                                     std::vector<size_t>& best, std::vector<float>& similarity) {
    qts::Screen& screen = *scratch_.screen;
    std::vector<const float*> a, b;
    std::vector<float> inverse_norm;
    for (size_t k = 0; k < alive_.size(); k += (alive_.size() + 15) / 16) {
      prepare(&alive_[k], 1);
      a.push_back(vectors_[alive_[k]]);
      inverse_norm.push_back(inverse_norm_[alive_[k]]);
    }
    screen.start(static_cast<int64_t>(even.size()), static_cast<int64_t>(odd.size()), a, inverse_norm);
    for (const bool right : {false, true}) {
      const std::vector<size_t>& side = right ? odd : even;
      for (size_t first = 0; first < side.size(); first += qts::screen::kPanelRows) {
        const size_t count = std::min<size_t>(side.size() - first, qts::screen::kPanelRows);
        prepare(side.data() + first, count);
        a.clear();
        inverse_norm.clear();
        for (size_t k = first; k < first + count; ++k) {
          a.push_back(vectors_[side[k]]);
          inverse_norm.push_back(inverse_norm_[side[k]]);
        }
        screen.pack(right, static_cast<int64_t>(first), a, inverse_norm);
      }
    }
    screen.multiply();
    a.clear();
    std::vector<size_t> left;
    std::vector<std::pair<size_t, size_t>> pairs;
    for (size_t i = 0; i < even.size(); ++i) {
      const int32_t* found;
      const int64_t count = screen.candidates(static_cast<int64_t>(i), found);
      if (4 * static_cast<size_t>(count) > odd.size()) {
        left.push_back(i);
        continue;
      }
      for (int64_t k = 0; k < count; ++k) pairs.emplace_back(i, found[k]);
    }
    for (const auto& [i, j] : pairs) {
      a.push_back(vectors_[even[i]]);
      b.push_back(vectors_[odd[j]]);
    }
    scratch_.dots.resize(pairs.size());
    QTS_DISPATCH(dot_pairs, a.data(), b.data(), static_cast<int64_t>(pairs.size()), shape_.columns,
                 scratch_.dots.data());
    for (size_t k = 0; k < pairs.size(); ++k)
      take(scratch_.dots[k], even, odd, pairs[k].first, pairs[k].second, best, similarity);
    return left;
  }

  // Moves the guests into the clusters of `odd`; the means that another round matches are made anew.
  void join(const std::vector<size_t>& odd, const std::vector<std::vector<size_t>>& guests, bool another) {
    std::vector<size_t> into(size());
    std::vector<float> factor(size(), 1.0f), weights;
    std::iota(into.begin(), into.end(), 0);
    std::vector<const void*> from;
    for (size_t j = 0; j < odd.size(); ++j) {
      if (guests[j].empty()) continue;
      const size_t host = odd[j];
      float whole = weight_[host];
      for (const size_t i : guests[j]) whole += weight_[i];
      from.assign(1, vectors_[host]);
      weights.assign(1, weight_[host] / whole);
      for (const size_t i : guests[j]) {
        into[i] = host;
        factor[i] = weight_[i] / whole;
        from.push_back(vectors_[i]);
        weights.push_back(factor[i]);
      }
      factor[host] = weights[0];
      if (another) {
        float* to = scratch_.means.get() + place(host, guests[j]) * shape_.columns;
        QTS_DISPATCH(weighted_rows, Element::fp32, from.data(), weights.data(), static_cast<int64_t>(from.size()),
                     shape_.columns, Element::fp32, to);
        vectors_[host] = to;
        measured_[host] = false;
      }
      weight_[host] = shape_.compat ? 1.0f : whole;
    }
    for (size_t i = 0; i < size(); ++i) {
      share_[i] *= factor[root_[i]];
      root_[i] = into[root_[i]];
    }
  }

  // Where a host's mean goes: its place, or that of a guest, or a free one. Every place in use is that of a cluster of
  // two tokens at least, so half as many as there are tokens are enough. (weighted_rows reads a stretch of columns of
  // all rows before it writes it, so the result may lie on one of them.)
  int64_t place(size_t host, const std::vector<size_t>& guests) {
    places_.resize(size(), -1);
    for (const size_t i : guests) {
      if (places_[i] < 0) continue;
      if (places_[host] < 0) {
        places_[host] = places_[i];
      } else {
        free_places_.push_back(places_[i]);
      }
      places_[i] = -1;
    }
    if (places_[host] < 0 && !free_places_.empty()) {
      places_[host] = free_places_.back();
      free_places_.pop_back();
    }
    if (places_[host] < 0) places_[host] = next_place_++;
    return places_[host];
  }

  const Shape& shape_;
  Scratch& scratch_;
  const char* x_;
  const float* sizes_;
  bool screened_;
  std::vector<size_t> alive_, root_;
  std::vector<const float*> vectors_;
  std::vector<float> share_, weight_, inverse_norm_;
  std::vector<bool> measured_;
  std::vector<int64_t> places_, free_places_;
  int64_t next_place_ = 0;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_tokens(Tensor frames, Tensor counts, Tensor cu_seqlens,
                                                        std::optional<Tensor> sizes, int64_t total, bool compat) {
  frames = torch::stable::contiguous(frames);
  counts = torch::stable::contiguous(counts);
  cu_seqlens = torch::stable::contiguous(cu_seqlens);
  if (sizes.has_value()) sizes = torch::stable::contiguous(*sizes);
  const int64_t count = frames.size(0), length = frames.size(1), columns = frames.size(2);
  const int64_t row_bytes = columns * static_cast<int64_t>(frames.element_size());
  const Shape shape{length, columns, qts::element_type(frames), row_bytes, compat};
  const int64_t* wanted = counts.const_data_ptr<int64_t>();
  const int32_t* offsets = cu_seqlens.const_data_ptr<int32_t>();
  const float* size = sizes.has_value() ? sizes->const_data_ptr<float>() : nullptr;
  STD_TORCH_CHECK(counts.numel() == count && cu_seqlens.numel() == count + 1, "counts and cu_seqlens must be of ",
                  count, " frames, got ", counts.numel(), " and ", cu_seqlens.numel() - 1);
  for (int64_t t = 0; t < count; ++t)
    STD_TORCH_CHECK(0 <= wanted[t] && wanted[t] <= length && 0 <= offsets[t] && offsets[t] <= offsets[t + 1] &&
                        offsets[t + 1] <= total && offsets[t + 1] - offsets[t] <= wanted[t],
                    "counts must be in [0, ", length, "], and cu_seqlens must be made of them");

  Tensor tokens = torch::stable::new_empty(frames, {total, columns});
  Tensor merged = torch::stable::new_empty(frames, {total}, ScalarType::Float);
  Tensor rows = torch::stable::new_empty(frames, {count, length}, ScalarType::Long);
  Tensor shares = torch::stable::new_empty(frames, {count, length}, ScalarType::Float);
  const auto* x = static_cast<const char*>(frames.const_data_ptr());
  auto* out = static_cast<char*>(tokens.mutable_data_ptr());
  float* out_sizes = merged.mutable_data_ptr<float>();
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  float* share = shares.mutable_data_ptr<float>();
  const int64_t stop = count > 0 ? offsets[count] : 0;
  std::memset(out + stop * row_bytes, 0, static_cast<size_t>((total - stop) * row_bytes));
  std::fill(out_sizes + stop, out_sizes + total, 0.0f);

  const double flops = static_cast<double>(count) * static_cast<double>(length * length) * static_cast<double>(columns);
  qts::advise_huge_pages(out, total * row_bytes);
  qts::for_each_item(count, flops, [&] {
    return [&, scratch = std::make_unique<Scratch>(shape)](int64_t t) {
      const int64_t kept = offsets[t + 1] - offsets[t];
      if (kept == 0) {
        std::fill(row + t * length, row + (t + 1) * length, int64_t{-1});
        std::fill(share + t * length, share + (t + 1) * length, 0.0f);
        return;
      }
      Frame frame(shape, *scratch, x + t * length * row_bytes, size ? size + t * length : nullptr);
      frame.merge(wanted[t]);
      frame.write(offsets[t], kept, out, out_sizes, row + t * length, share + t * length);
    };
  });
  return {tokens, merged, rows, shares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("merge_tokens", TORCH_BOX(&merge_tokens)); }
