// Which odd rows can have the largest cosine similarity with an even row, found with products in bf16.
//
// Let u and v be two rows times their inverse norms as fp32 holds them, less a center m, which may be any vector, and
// u', v' their roundings to bf16. The similarity of the rows is <u, v> + <m, v> and what is the same for every v. By
// Cauchy-Schwarz <u, v> - <u', v'> = <u - u', v> + <u', v - v'> is at most |u - u'| |v| + |u'| |v - v'|. Norms and
// residuals |u - u'| are measured, row by row, and taken 2^-6 larger; the center, a mean of some rows, makes both small
// where all tokens are alike.
// Beside this there are roundings. The D additions in fp32 of the product in bf16 are off by at most 2^-23 of |u'| |v'|
// each (twice what tdpbf16ps, which rounds to nearest, can be off; its flush of subnormals is nothing beside it). The
// similarity that is to be found adds up the fp32 product in 16 lanes of chunks of 768 columns, at most 52 + D / 768
// additions in a row, each off by 2^-24. <m, v> is added up in 16 lanes, by additions off by 2^-24 of |m| |v| < 2.1.
// With the few operations before and after these, all of it is less than (D / 4 + 256) 2^-24. So
//   |similarity - <u', v'> - <m, v> - what all v share| <= |v| (|u - u'| + D 2^-23 |u|) + |u| |v - v'| + slack,
//   slack = (D / 4 + 256) 2^-24,
// and an odd row whose upper bound is below another one's lower bound does not have the largest similarity. This holds
// for rows whose norm is far from the ends of fp32; the bound of any other one is infinite: it is always a candidate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "gather_tokens/rows.h"
#include "merge_tokens/screen_kernels.h"
#include "weighted_rows/kernels.h"

namespace qts {

// Null where the CPU has no fast product of bf16. (vdpbf16ps was no faster than the fp32 product on a Xeon.)
inline const screen::Kernels* screen_kernels() {
#if QTS_AMX
  if (isa() >= Isa::amx_bf16) return &amx_bf16::screen_kernels();
#endif
  return nullptr;
}

class Screen {
 public:
  // Fewer rows than these are compared sooner than they are packed.
  static constexpr int64_t kFewest = 32;

  Screen(int64_t most_rows, int64_t columns)
      : columns_(columns), panel_((columns + screen::kTileColumns - 1) / screen::kTileColumns * kTile),
        packed_{make(panels(most_rows) * panel_), make(panels(most_rows) * panel_)},
        products_(panels(most_rows) * panels(most_rows) * 256), found_(static_cast<size_t>(most_rows) + 16) {}

  // Even and odd rows of this round, and some rows whose mean is the center.
  void start(int64_t even, int64_t odd, const std::vector<const float*>& some, const std::vector<float>& inverse_norm) {
    rows_[0] = even;
    rows_[1] = odd;
    for (int right = 0; right < 2; ++right)
      for (auto& fact : facts_[right])
        fact.assign(static_cast<size_t>(panels(rows_[right]) * screen::kPanelRows), 0.0f);
    std::vector<const void*> rows;
    std::vector<float> weights;
    for (size_t i = 0; i < some.size(); ++i) {
      if (!is_usual(inverse_norm[i])) continue;
      rows.push_back(some[i]);
      weights.push_back(inverse_norm[i] / static_cast<float>(some.size()));
    }
    center_.assign(static_cast<size_t>(columns_), 0.0f);
    QTS_DISPATCH(weighted_rows, Element::fp32, rows.data(), weights.data(), static_cast<int64_t>(rows.size()), columns_,
                 Element::fp32, center_.data());
  }

  // The even (right: odd) rows first, first + 1, ..., 16 at most; first is a multiple of 16.
  void pack(bool right, int64_t first, const std::vector<const float*>& rows, const std::vector<float>& inverse_norm) {
    const float* from[screen::kPanelRows] = {};
    for (size_t i = 0; i < rows.size(); ++i) from[i] = is_usual(inverse_norm[i]) ? rows[i] : nullptr;
    float scale[screen::kPanelRows] = {};
    std::copy(inverse_norm.begin(), inverse_norm.end(), scale);
    const screen::Facts facts = facts_of(right, first);
    kernels_->pack(from, scale, center_.data(), columns_, right,
                   packed_[right].get() + first / screen::kPanelRows * panel_, facts);
    for (size_t i = 0; i < rows.size(); ++i) {
      facts.norm[i] = (1 + 0x1p-6f) * facts.norm[i] + 0x1p-30f;
      facts.residual[i] = from[i] ? (1 + 0x1p-6f) * facts.residual[i] : std::numeric_limits<float>::infinity();
    }
  }

  void multiply() {
    // Panels are multiplied two by two; what is behind the last row of an odd one is never looked at.
    kernels_->multiply(packed_[0].get(), panels(rows_[0]), packed_[1].get(), panels(rows_[1]), columns_,
                       products_.get());
  }

  // The odd rows that can be the most similar one of even row i, in ascending order, and how many they are.
  int64_t candidates(int64_t i, const int32_t*& found) {
    const auto d = static_cast<float>(columns_);
    const screen::Facts left = facts_of(false, i);
    found = found_.data();
    const float* products = products_.get() + i * panels(rows_[1]) * screen::kPanelRows;
    return kernels_->candidates(products, facts_of(true, 0), rows_[1], *left.residual + d * 0x1p-23f * *left.norm,
                                *left.norm, (d / 4 + 256) * 0x1p-24f, found_.data());
  }

 private:
  static constexpr int64_t kTile = screen::kPanelRows * screen::kTileColumns;
  static int64_t panels(int64_t rows) { return (rows + 2 * screen::kPanelRows - 1) / (2 * screen::kPanelRows) * 2; }
  static bool is_usual(float inverse_norm) { return inverse_norm > 0x1p-30f && inverse_norm < 0x1p30f; }
  screen::Facts facts_of(bool right, int64_t row) {
    return {facts_[right][0].data() + row, facts_[right][1].data() + row, facts_[right][2].data() + row};
  }
  static Buffer<bf16> make(int64_t n) {
    Buffer<bf16> made(n);
    advise_huge_pages(made.get(), n * static_cast<int64_t>(sizeof(bf16)));
    return made;
  }

  const screen::Kernels* const kernels_ = screen_kernels();
  int64_t columns_, panel_, rows_[2] = {};
  Buffer<bf16> packed_[2];
  Buffer<float> products_;
  std::vector<float> facts_[2][3], center_;
  std::vector<int32_t> found_;
};

}  // namespace qts
