// Row gather on the CPU: several tensors of any dtype in one pass over the indices.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "gather_tokens/rows.h"

namespace {

using torch::stable::Tensor;

struct Copy {
  const char* source;
  char* target;
  int64_t row_bytes, source_stride, source_rows;
};

void copy_rows(const Copy& c, const int64_t* indices, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = indices[i];
    char* target = c.target + i * c.row_bytes;
    if (row < 0 || row >= c.source_rows) {
      std::memset(target, 0, static_cast<size_t>(c.row_bytes));
      continue;
    }
    std::memcpy(target, c.source + row * c.source_stride, static_cast<size_t>(c.row_bytes));
  }
}

std::vector<Tensor> gather_rows(std::vector<Tensor> tensors, Tensor indices) {
  indices = torch::stable::contiguous(indices);
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();

  std::vector<Tensor> outputs;
  std::vector<Copy> copies;
  int64_t bytes = 0;
  for (Tensor& x : tensors) {
    if (!qts::rows_are_dense(x)) x = torch::stable::contiguous(x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape[0] = count;
    outputs.push_back(torch::stable::new_empty(x, shape));
    const auto item = static_cast<int64_t>(x.element_size());
    const int64_t row_bytes = qts::row_numel(x) * item;
    if (row_bytes == 0 || count == 0) continue;
    const auto* source = static_cast<const char*>(x.const_data_ptr());
    auto* target = static_cast<char*>(outputs.back().mutable_data_ptr());
    copies.push_back({source, target, row_bytes, x.stride(0) * item, x.size(0)});
    qts::advise_huge_pages(target, row_bytes * count);
    bytes += row_bytes;
  }
  if (copies.empty()) return outputs;

  // A thread's rows follow one another, so it streams through its part of each output.
  const int64_t grain = std::max<int64_t>(1, qts::kBytesAThread / bytes);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (const Copy& c : copies) copy_rows(c, index, begin, end);
  });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("gather_rows", TORCH_BOX(&gather_rows)); }
