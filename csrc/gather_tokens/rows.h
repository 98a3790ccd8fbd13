// Rows of a tensor as bytes: what the gathers share.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace qts {

constexpr int64_t kBytesAThread = 1 << 16;
constexpr uintptr_t kHugePage = 2 << 20;

inline int64_t row_numel(const torch::stable::Tensor& x) {
  int64_t numel = 1;
  for (int64_t d = 1; d < x.dim(); ++d) numel *= x.size(d);
  return numel;
}

// Whether each row is one stretch of memory. The rows themselves may lie anywhere: a slice of columns, or an expanded
// row, is gathered without a copy of the whole tensor.
inline bool rows_are_dense(const torch::stable::Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 1; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// A large output is fresh memory, and mapping it page by page costs more than the copy itself. Only whole huge pages
// inside the output are asked for; the kernel is free to refuse.
inline void advise_huge_pages(void* data, int64_t bytes) {
  const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const auto last = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace qts
