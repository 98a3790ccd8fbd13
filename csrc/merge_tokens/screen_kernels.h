// Approximate products of rows in bf16, where the CPU has tiles for them; what they are for is said in screen.h.
//
// Rows are packed 16 at a time, a panel, in tiles of 32 columns, 1 KB each: panel[tile][row][32], or for the right side
// of a product panel[tile][pair of columns][row][2]. Rows and columns that are missing are zeros.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace qts::screen {

constexpr int64_t kPanelRows = 16, kTileColumns = 32;

// Of 16 packed rows: the norm, the norm of what rounding to bf16 took off, and the product with the center. Norms are
// right to 2^-8 of them.
struct Facts {
  float *norm, *residual, *offset;
};

struct Kernels {
  // Packs the bf16 of scale[i] * rows[i] - center for 16 rows; a null one is zeros.
  void (*pack)(const float* const* rows, const float* scale, const float* center, int64_t columns, bool right,
               bf16* panel, const Facts& facts);
  // out[i * 16 * panels_b + j] = <row i of a, row j of b>. panels_a and panels_b are even.
  void (*multiply)(const bf16* a, int64_t panels_a, const bf16* b, int64_t panels_b, int64_t columns, float* out);
  // With s[j] = products[j] + right.offset[j] and e[j] = right.norm[j] * a + right.residual[j] * b + slack, the
  // j < count with s[j] + e[j] >= max over j of (s[j] - e[j]), in ascending order, to `found`, which has room for 16
  // more than count; how many there are.
  int64_t (*candidates)(const float* products, const Facts& right, int64_t count, float a, float b, float slack,
                        int32_t* found);
};

}  // namespace qts::screen

namespace qts {

#if QTS_AMX
namespace amx_bf16 {
const screen::Kernels& screen_kernels();
}
#endif

}  // namespace qts
