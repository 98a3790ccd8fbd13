// The re-encoder's row kernels, one copy for each instruction set (cpu/isa.h). Each handles rows [begin, end).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace qts {

enum class Float { fp32, bf16, fp16 };

// sum = x[row] + addend, rounded to the element type; normed = sum * rstd * weight, rounded once.
struct NormRows {
  const void* x;
  const int64_t* indices;  // row of x for each row of the result; null: the same row
  int64_t x_rows, x_stride;
  const void *addend, *weight;  // either may be null
  void *sum, *normed;
  float* rstd;
  int64_t columns;
  float eps;
};

struct NormGradient {
  const void *grad_normed, *grad_sum, *x, *weight;  // grad_sum and weight may be null
  const float* rstd;
  void* grad_x;
  int64_t columns;
};

struct GeluRows {
  const void *grad, *x, *bias;  // grad is null in the forward pass
  void* out;                    // gelu(x + bias), or grad * gelu'(x + bias)
  int64_t columns;
};

// `column_sums`, fp32 [columns], is overwritten with the sum over the rows: grad_weight's, or grad_bias's. May be null.
#define QTS_DECLARE(isa)                                                                                              \
  namespace isa {                                                                                                     \
  void norm_rows(Float type, const NormRows& rows, int64_t begin, int64_t end);                                       \
  void norm_gradient(Float type, const NormGradient& rows, int64_t begin, int64_t end, float* column_sums);           \
  void gelu_rows(Float type, const GeluRows& rows, int64_t begin, int64_t end);                                       \
  void gelu_gradient(Float type, const GeluRows& rows, int64_t begin, int64_t end, float* column_sums);               \
  }
QTS_DECLARE(portable)
#if QTS_X86
QTS_DECLARE(avx2)
QTS_DECLARE(avx512)
#endif
#undef QTS_DECLARE

}  // namespace qts
