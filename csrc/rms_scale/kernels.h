// rms_scale's kernel: one copy an instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace qts {

// out[r] = 1 / sqrt(mean of x[r]^2 + eps) for `rows` rows of `width` elements, `stride` elements apart.
#define QTS_RMS_SCALE(T) \
  void rms_scale(const T* x, int64_t stride, int64_t rows, int64_t width, float eps, float* out)

#define QTS_RMS_SCALE_COPIES(isa) \
  namespace isa {                 \
  QTS_RMS_SCALE(float);           \
  QTS_RMS_SCALE(bf16);            \
  QTS_RMS_SCALE(fp16);            \
  }

QTS_RMS_SCALE_COPIES(portable)
#if QTS_X86
QTS_RMS_SCALE_COPIES(avx2)
QTS_RMS_SCALE_COPIES(avx512)
#endif

}  // namespace qts
