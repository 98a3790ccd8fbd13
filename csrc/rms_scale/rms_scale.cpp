// qts_kernels_native::rms_scale on the CPU: 1/rms of each row in one read.

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/parallel.h"
#include "rms_scale/kernels.h"

namespace qts {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
void run(const Tensor& x, int64_t stride, int64_t rows, int64_t width, float eps, float* out) {
  const T* const from = static_cast<const T*>(x.const_data_ptr());
  // 128 KiB at a time: long enough to stream, short enough to share out.
  const int64_t block = std::max<int64_t>(1, (128 << 10) / (width * static_cast<int64_t>(sizeof(T))));
  for_each_item((rows + block - 1) / block, 2.0 * rows * width, [&] {
    return [&](int64_t i) {
      const int64_t begin = i * block, count = std::min(block, rows - begin);
      QTS_DISPATCH(rms_scale, from + begin * stride, stride, count, width, eps, out + begin);
    };
  });
}

Tensor rms_scale_op(Tensor x, double eps) {
  const int64_t width = x.size(-1);
  const bool rows_apart = x.dim() == 2 && x.stride(1) == 1;
  if (!rows_apart) x = torch::stable::contiguous(x);
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Float);
  const int64_t rows = out.numel();
  if (rows == 0) return out;
  const int64_t stride = rows_apart ? x.stride(0) : width;
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run<float>(x, stride, rows, width, eps, to);
      break;
    case ScalarType::BFloat16:
      run<bf16>(x, stride, rows, width, eps, to);
      break;
    case ScalarType::Half:
      run<fp16>(x, stride, rows, width, eps, to);
      break;
    default:
      STD_TORCH_CHECK(false, "x must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace
}  // namespace qts

STABLE_TORCH_LIBRARY_IMPL(qts_kernels_native, CPU, m) { m.impl("rms_scale", TORCH_BOX(&qts::rms_scale_op)); }
