// The element type of a tensor, for weighted_rows.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "weighted_rows/kernels.h"

namespace qts {

inline Element element_type(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return Element::fp32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::fp16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

}  // namespace qts
