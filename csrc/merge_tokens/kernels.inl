// Dot products of rows. Included after cpu/target_<isa>.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {

// As many sums as there are registers for.
constexpr int kTileA = LANES == 16 ? 6 : 2, kTileB = 4;
// A chunk of kTileA rows of a stays in the first cache while all rows of b, a chunk of each, stream from the second.
constexpr int64_t kDotChunk = 768;

template <int A, int B>
void dot_tile(const float* const* a, const float* const* b, int64_t start, int64_t width, float* out, int64_t stride) {
  Vec sums[A][B] = {};
  int64_t j = start;
  for (; j + LANES <= start + width; j += LANES) {
    Vec right[B];
    for (int n = 0; n < B; ++n) right[n] = load(b[n] + j);
    for (int m = 0; m < A; ++m) {
      const Vec left = load(a[m] + j);
      for (int n = 0; n < B; ++n) sums[m][n] = fma(left, right[n], sums[m][n]);
    }
  }
  if (j < start + width) {
    const int64_t part = start + width - j;
    for (int m = 0; m < A; ++m)
      for (int n = 0; n < B; ++n) sums[m][n] = fma(load_part(a[m] + j, part), load_part(b[n] + j, part), sums[m][n]);
  }
  for (int m = 0; m < A; ++m)
    for (int n = 0; n < B; ++n) out[m * stride + n] += sum_lanes(sums[m][n]);
}

template <int A>
void dot_strip(const float* const* a, const float* const* b, int64_t count_b, int64_t start, int64_t width,
               float* out) {
  int64_t n = 0;
  for (; n + kTileB <= count_b; n += kTileB) dot_tile<A, kTileB>(a, b + n, start, width, out + n, count_b);
  for (; n < count_b; ++n) dot_tile<A, 1>(a, b + n, start, width, out + n, count_b);
}

// N products side by side, so that one need not wait for its own last addition.
template <int N>
void dot_chains(const float* const* a, const float* const* b, int64_t columns, float* out) {
  for (int n = 0; n < N; ++n) out[n] = 0.0f;
  for (int64_t start = 0; start < columns; start += kDotChunk) {
    const int64_t stop = columns - start < kDotChunk ? columns : start + kDotChunk;
    Vec sums[N] = {};
    int64_t j = start;
    for (; j + LANES <= stop; j += LANES)
      for (int n = 0; n < N; ++n) sums[n] = fma(load(a[n] + j), load(b[n] + j), sums[n]);
    if (j < stop)
      for (int n = 0; n < N; ++n) sums[n] = fma(load_part(a[n] + j, stop - j), load_part(b[n] + j, stop - j), sums[n]);
    for (int n = 0; n < N; ++n) out[n] += sum_lanes(sums[n]);
  }
}

}  // namespace

void dot_pairs(const float* const* a, const float* const* b, int64_t count, int64_t columns, float* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) dot_chains<4>(a + i, b + i, columns, out + i);
  for (; i < count; ++i) dot_chains<1>(a + i, b + i, columns, out + i);
}

void dot_rows(const float* const* a, int64_t count_a, const float* const* b, int64_t count_b, int64_t columns,
              float* out) {
  __builtin_memset(out, 0, count_a * count_b * sizeof(float));
  for (int64_t start = 0; start < columns; start += kDotChunk) {
    const int64_t width = columns - start < kDotChunk ? columns - start : kDotChunk;
    int64_t m = 0;
    for (; m + kTileA <= count_a; m += kTileA) dot_strip<kTileA>(a + m, b, count_b, start, width, out + m * count_b);
    for (; m < count_a; ++m) dot_strip<1>(a + m, b, count_b, start, width, out + m * count_b);
  }
}

}  // namespace qts::QTS_ISA
