// Which odd rows can have the largest cosine similarity with an even row, found with products in bf16.
//
// Let u and v be two rows times their inverse norms as fp32 holds them, and u', v' their roundings to bf16. By
// Cauchy-Schwarz <u, v> - <u', v'> = <u - u', v> + <u', v - v'> is at most |u - u'| |v| + |u'| |v - v'|. The residuals
// |u - u'| are measured, row by row: some 2^-9, where the worst case is 2^-8. |v| and |u'| are within 2^-8 of 1.
// Beside this there are roundings: D additions in fp32 of the product in bf16, each at most 2^-23 of |u'| |v'| (twice
// what tdpbf16ps, which rounds to nearest, can be off; its flush of subnormals is nothing beside it); and those of the
// similarity that is to be found, which adds up the fp32 product in 16 lanes of chunks of 768 columns, at most
// 52 + D / 768 additions in a row of 2^-24 each, of the norms, which are added up in the same way, and of the
// multiplications by them. So
//   |similarity - <u', v'>| <= margin(u) + margin(v) + slack,
//   margin(u) = (1 + 2^-6) |u - u'|,  slack = (D + 256) 2^-23,
// and an odd row whose upper bound is below another one's lower bound does not have the largest similarity. This holds
// for rows whose norm is far from the ends of fp32; the margin of any other one is infinite: it is always a candidate.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
#include "gather_tokens/rows.h"
#include "merge_tokens/screen_kernels.h"

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

  // Even and odd rows of this round.
  void start(int64_t even, int64_t odd) {
    rows_[0] = even;
    rows_[1] = odd;
    for (int right = 0; right < 2; ++right)
      margins_[right].assign(static_cast<size_t>(panels(rows_[right]) * screen::kPanelRows), 0.0f);
  }

  // The even (right: odd) rows first, first + 1, ..., 16 at most; first is a multiple of 16.
  void pack(bool right, int64_t first, const std::vector<const float*>& rows, const std::vector<float>& inverse_norm) {
    constexpr float far = 0x1p30f, infinity = std::numeric_limits<float>::infinity();
    const float* from[screen::kPanelRows] = {};
    float scale[screen::kPanelRows] = {};
    bool usual[screen::kPanelRows] = {};
    for (size_t i = 0; i < rows.size(); ++i) {
      usual[i] = inverse_norm[i] > 1 / far && inverse_norm[i] < far;
      if (!usual[i]) continue;
      from[i] = rows[i];
      scale[i] = inverse_norm[i];
    }
    float* margin = margins_[right].data() + first;
    kernels_->pack(from, scale, columns_, right, packed_[right].get() + first / screen::kPanelRows * panel_, margin);
    for (size_t i = 0; i < rows.size(); ++i) margin[i] = usual[i] ? (1 + 0x1p-6f) * margin[i] : infinity;
  }

  void multiply() {
    // Panels are multiplied two by two; what is behind the last row of an odd one is never looked at.
    kernels_->multiply(packed_[0].get(), panels(rows_[0]), packed_[1].get(), panels(rows_[1]), columns_,
                       products_.get());
  }

  // The odd rows that can be the most similar one of even row i, in ascending order, and how many they are.
  int64_t candidates(int64_t i, const int32_t*& found) {
    const float slack = (static_cast<float>(columns_) + 256) * 0x1p-23f;
    const float* products = products_.get() + i * panels(rows_[1]) * screen::kPanelRows;
    found = found_.data();
    const float margin = margins_[0][static_cast<size_t>(i)];
    return kernels_->candidates(products, margins_[1].data(), rows_[1], 2 * (margin + slack), found_.data());
  }

 private:
  static constexpr int64_t kTile = screen::kPanelRows * screen::kTileColumns;
  static int64_t panels(int64_t rows) { return (rows + 2 * screen::kPanelRows - 1) / (2 * screen::kPanelRows) * 2; }
  static Buffer<bf16> make(int64_t n) {
    Buffer<bf16> made(n);
    advise_huge_pages(made.get(), n * static_cast<int64_t>(sizeof(bf16)));
    return made;
  }

  const screen::Kernels* const kernels_ = screen_kernels();
  int64_t columns_, panel_, rows_[2] = {};
  Buffer<bf16> packed_[2];
  Buffer<float> products_;
  std::vector<float> margins_[2];
  std::vector<int32_t> found_;
};

}  // namespace qts
