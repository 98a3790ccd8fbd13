// qts_kernels_native::relevance on the CPU. Two passes over the keys, in panels of at most 64 that fit the L1 cache: the
// first keeps each row's running maximum and sum, the second the best of s - lse[row] (or the sum of exponentials) of
// each key. Scores exist a tile at a time.

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "relevance/segments.h"

namespace qts::relevance {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "query must be float32, bfloat16 or float16");
  }
}

// By what a video alone and in a batch have in common, so that both score the same to the last bit.
const Kernels& kernels(const Input& in) {
#if QTS_AMX
  // A smaller head leaves most of a tile empty.
  if (isa() >= Isa::amx_bf16 && in.type == Type::bf16 && in.head_dim >= 32) return amx_bf16::relevance_kernels();
#endif
#if QTS_X86
  if (isa() >= Isa::avx512_bf16) return avx512_bf16::relevance_kernels(in.type);
#endif
  return QTS_DISPATCH(relevance_kernels, in.type);
}

Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

const int32_t* offsets(const char* name, const Tensor& x, Tensor& keep) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 1, name, " must be int32 with one axis");
  keep = torch::stable::contiguous(x);
  return static_cast<const int32_t*>(keep.const_data_ptr());
}

std::vector<Segment> segments_of(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                 const std::optional<Tensor>& column_start, const std::optional<Tensor>& cu_columns,
                                 int64_t total_columns) {
  Tensor keep[4];
  const int32_t* q = offsets("cu_seqlens_q", cu_seqlens_q, keep[0]);
  const int32_t* k = offsets("cu_seqlens_k", cu_seqlens_k, keep[1]);
  const int32_t* start = column_start ? offsets("column_start", *column_start, keep[2]) : nullptr;
  const int32_t* out = cu_columns ? offsets("cu_columns", *cu_columns, keep[3]) : k;
  const int64_t count = cu_seqlens_k.numel() - 1;
  STD_TORCH_CHECK(cu_seqlens_q.numel() == count + 1 && (!cu_columns || cu_columns->numel() == count + 1) &&
                      (!column_start || column_start->numel() == count),
                  "cu_seqlens_q, cu_seqlens_k, cu_columns and column_start must have the same number of segments");
  std::vector<Segment> segments(count);
  for (int64_t i = 0; i < count; ++i) {
    Segment& s = segments[i];
    s.query_begin = q[i];
    s.length = q[i + 1] - q[i];
    s.key_begin = k[i];
    s.keys = k[i + 1] - k[i];
    s.column_begin = start ? start[i] : 0;
    s.out_begin = out[i];
    s.columns = out[i + 1] - out[i];
    STD_TORCH_CHECK(s.column_begin >= 0 && s.columns >= 0 && s.column_begin + s.columns <= s.keys,
                    "columns of segment ", i, " must lie in its ", s.keys, " keys, got ", s.column_begin, " to ",
                    s.column_begin + s.columns);
  }
  STD_TORCH_CHECK(count == 0 || out[count] == total_columns, "total_columns must be ", out[count], ", got ",
                  total_columns);
  return segments;
}

std::tuple<Tensor, Tensor, Tensor> relevance(Tensor query, Tensor key, std::optional<Tensor> key_scale,
                                             Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                             std::optional<Tensor> column_start, std::optional<Tensor> cu_columns,
                                             int64_t total_columns, std::string reduce, double scale, bool causal,
                                             bool with_argrow) {
  const Type type = type_of(query);
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "key must have the dtype of query");
  STD_TORCH_CHECK(reduce == "max" || reduce == "mean", "reduce must be 'max' or 'mean', got '", reduce, "'");
  query = with_contiguous_rows(query);
  key = with_contiguous_rows(key);
  if (key_scale) {
    STD_TORCH_CHECK(key_scale->scalar_type() == ScalarType::Float && key_scale->numel() == key.size(0),
                    "key_scale must be float32 [", key.size(0), "]");
    key_scale = torch::stable::contiguous(*key_scale);
  }
  const int64_t bytes = type == Type::f32 ? 4 : 2;
  const Input input{type,
                    static_cast<const char*>(query.const_data_ptr()),
                    static_cast<const char*>(key.const_data_ptr()),
                    query.stride(0) * bytes,
                    query.stride(1) * bytes,
                    key.stride(0) * bytes,
                    key.stride(1) * bytes,
                    query.size(0),
                    query.size(1),
                    key.size(1),
                    query.size(2),
                    key_scale ? static_cast<const float*>(key_scale->const_data_ptr()) : nullptr,
                    scale,
                    causal};
  std::vector<Segment> segments = segments_of(cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, total_columns);

  const bool mean = reduce == "mean";
  const int64_t attained = with_argrow && !mean ? total_columns : 0;
  Tensor scores = torch::stable::new_empty(query, {total_columns}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {input.heads, input.query_rows}, ScalarType::Float);
  Tensor argrow = torch::stable::new_empty(query, {attained}, ScalarType::Long);
  float* const score = static_cast<float*>(scores.mutable_data_ptr());
  float* const row_lse = static_cast<float*>(lse.mutable_data_ptr());
  int64_t* const row = attained > 0 ? static_cast<int64_t*>(argrow.mutable_data_ptr()) : nullptr;
  for (const Segment& s : segments) {
    if (s.length > 0 && s.keys > 0) continue;
    std::fill_n(score + s.out_begin, s.columns, 0.0f);
    if (row != nullptr) std::fill_n(row + s.out_begin, s.columns, 0);
    for (int64_t h = 0; h < input.heads; ++h) {
      std::fill_n(row_lse + h * input.query_rows + s.query_begin, s.length, -std::numeric_limits<float>::infinity());
    }
  }
  Workspace workspace(input, kernels(input), mean, segments);
  workspace.row_statistics(row_lse);
  workspace.column_scores(score, row);
  return {scores, lse, argrow};
}

}  // namespace
}  // namespace qts::relevance

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("relevance", TORCH_BOX(&qts::relevance::relevance)); }
