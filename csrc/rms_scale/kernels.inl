#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {

template <typename T>
QTS_INLINE float sum_of_squares(const T* x, int64_t width) {
  // Four sums keep four multiply-adds in flight: the reading of x is what takes the time.
  Vec sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * LANES);
      sum[j] = fma(v, v, sum[j]);
    }
  }
  for (; i < width; i += LANES) {
    const Vec v = i + LANES <= width ? load(x + i) : load_part(x + i, width - i);
    sum[0] = fma(v, v, sum[0]);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <typename T>
QTS_INLINE void scale_rows(const T* x, int64_t stride, int64_t rows, int64_t width, float eps, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    out[r] = 1.0f / __builtin_sqrtf(sum_of_squares(x + r * stride, width) / static_cast<float>(width) + eps);
  }
}

}  // namespace

QTS_RMS_SCALE(float) { scale_rows(x, stride, rows, width, eps, out); }
QTS_RMS_SCALE(bf16) { scale_rows(x, stride, rows, width, eps, out); }
QTS_RMS_SCALE(fp16) { scale_rows(x, stride, rows, width, eps, out); }

}  // namespace qts::QTS_ISA
