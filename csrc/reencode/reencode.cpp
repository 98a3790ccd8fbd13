// The re-encoder's row operations on the CPU: tensors, threads and the order of sums. The arithmetic is in kernels.inl.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "gather_tokens/rows.h"
#include "reencode/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using qts::Float;

constexpr int64_t kElementsAThread = 1 << 14;
// Column sums are added up in this many parts at most, cut by the number of rows alone: the bits of a gradient do not
// depend on the number of threads.
constexpr int64_t kMaxParts = 256;
constexpr int64_t kRowsAPart = 32;

Float float_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Float::fp32;
    case ScalarType::BFloat16: return Float::bf16;
    case ScalarType::Half: return Float::fp16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  if (!x.has_value()) return std::nullopt;
  return torch::stable::contiguous(*x);
}

const void* data(const std::optional<Tensor>& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

void check_like(const std::optional<Tensor>& x, const Tensor& like, int64_t numel) {
  if (!x.has_value()) return;
  STD_TORCH_CHECK(x->scalar_type() == like.scalar_type() && x->numel() == numel, "expected ", numel,
                  " elements of the first tensor's dtype, got ", x->numel());
}

template <class F>
void parallel_rows(int64_t rows, int64_t columns, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kElementsAThread / std::max<int64_t>(columns, 1)), f);
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, const Tensor* indices, const std::optional<Tensor>& addend,
                                        const std::optional<Tensor>& weight, double eps) {
  const int64_t rows = indices ? indices->numel() : x.size(0), columns = x.size(1);
  check_like(addend, x, rows * columns);
  check_like(weight, x, columns);
  const Float type = float_type(x);
  Tensor sum = torch::stable::new_empty(x, {rows, columns});
  Tensor normed = torch::stable::new_empty(x, {rows, columns});
  Tensor rstd = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  const qts::NormRows work{x.const_data_ptr(),
                           indices ? indices->const_data_ptr<int64_t>() : nullptr,
                           x.size(0),
                           x.stride(0),
                           data(addend),
                           data(weight),
                           sum.mutable_data_ptr(),
                           normed.mutable_data_ptr(),
                           rstd.mutable_data_ptr<float>(),
                           columns,
                           static_cast<float>(eps)};
  for (const Tensor* out : {&sum, &normed})
    qts::advise_huge_pages(out->mutable_data_ptr(), out->numel() * static_cast<int64_t>(out->element_size()));
  parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { QTS_DISPATCH(norm_rows, type, work, begin, end); });
  return {sum, normed, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gather_add_rms_norm(Tensor tokens, Tensor indices, std::optional<Tensor> addend,
                                                       std::optional<Tensor> weight, double eps) {
  if (!qts::rows_are_dense(tokens)) tokens = torch::stable::contiguous(tokens);
  indices = torch::stable::contiguous(indices);
  return norm(tokens, &indices, contiguous(addend), contiguous(weight), eps);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps) {
  return norm(torch::stable::contiguous(x), nullptr, torch::stable::contiguous(residual), contiguous(weight), eps);
}

// f(begin, end, column_sums) for each part of the rows; then the parts' sums, added up in double in their order.
template <class F>
Tensor summed_columns(const Tensor& like, int64_t rows, int64_t columns, const F& f) {
  const int64_t parts = std::clamp<int64_t>((rows + kRowsAPart - 1) / kRowsAPart, 1, kMaxParts);
  Tensor partial = torch::stable::new_empty(like, {parts, columns}, ScalarType::Float);
  Tensor total = torch::stable::new_empty(like, {columns}, ScalarType::Float);
  float* sums = partial.mutable_data_ptr<float>();
  float* out = total.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(rows * p / parts, rows * (p + 1) / parts, sums + p * columns);
  });
  const int64_t grain = std::max<int64_t>(16, kElementsAThread / parts);
  torch::stable::parallel_for(0, columns, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kTile = 64;
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t width = std::min(kTile, end - i);
      double tile[kTile] = {};
      for (int64_t p = 0; p < parts; ++p)
        for (int64_t j = 0; j < width; ++j) tile[j] += sums[p * columns + i + j];
      for (int64_t j = 0; j < width; ++j) out[i + j] = static_cast<float>(tile[j]);
    }
  });
  return total;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_normed, std::optional<Tensor> grad_sum, Tensor x,
                                             std::optional<Tensor> weight, Tensor rstd) {
  x = torch::stable::contiguous(x);
  grad_normed = torch::stable::contiguous(grad_normed);
  grad_sum = contiguous(grad_sum);
  weight = contiguous(weight);
  rstd = torch::stable::contiguous(rstd);
  const int64_t rows = x.size(0), columns = x.size(1);
  const Float type = float_type(x);
  check_like(grad_normed, x, rows * columns);
  check_like(grad_sum, x, rows * columns);
  check_like(weight, x, columns);
  STD_TORCH_CHECK(rstd.numel() == rows, "rstd must have ", rows, " entries, got ", rstd.numel());
  Tensor grad_x = torch::stable::new_empty(x, {rows, columns});
  const qts::NormGradient work{grad_normed.const_data_ptr(), data(grad_sum), x.const_data_ptr(), data(weight),
                               rstd.const_data_ptr<float>(), grad_x.mutable_data_ptr(), columns};
  if (!weight.has_value()) {
    parallel_rows(rows, columns, [&](int64_t begin, int64_t end) {
      QTS_DISPATCH(norm_gradient, type, work, begin, end, nullptr);
    });
    return {grad_x, torch::stable::new_empty(x, {0}, ScalarType::Float)};
  }
  return {grad_x, summed_columns(x, rows, columns, [&](int64_t begin, int64_t end, float* sums) {
            QTS_DISPATCH(norm_gradient, type, work, begin, end, sums);
          })};
}

Tensor bias_gelu(Tensor x, Tensor bias) {
  x = torch::stable::contiguous(x);
  bias = torch::stable::contiguous(bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const Float type = float_type(x);
  check_like(bias, x, columns);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  qts::advise_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  const qts::GeluRows work{nullptr, x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), columns};
  parallel_rows(rows, columns, [&](int64_t begin, int64_t end) { QTS_DISPATCH(gelu_rows, type, work, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) {
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  bias = torch::stable::contiguous(bias);
  const int64_t rows = x.size(0), columns = x.size(1);
  const Float type = float_type(x);
  check_like(grad, x, rows * columns);
  check_like(bias, x, columns);
  Tensor grad_x = torch::stable::new_empty(x, {rows, columns});
  const qts::GeluRows work{grad.const_data_ptr(), x.const_data_ptr(), bias.const_data_ptr(), grad_x.mutable_data_ptr(),
                           columns};
  return {grad_x, summed_columns(x, rows, columns, [&](int64_t begin, int64_t end, float* sums) {
            QTS_DISPATCH(gelu_gradient, type, work, begin, end, sums);
          })};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) {
  m.impl("gather_add_rms_norm", TORCH_BOX(&gather_add_rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}
