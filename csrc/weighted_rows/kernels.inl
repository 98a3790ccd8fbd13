// A weighted sum of rows. Included after cpu/target_<isa>.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"

namespace qts::QTS_ISA {
namespace {

// Partial sums of this many columns stay in the first cache while the rows stream past, four at a time.
constexpr int64_t kChunk = 1024;

template <typename T>
QTS_INLINE Vec get_row(const T* from, int64_t width) {
  return width == LANES ? load(from) : load_part(from, width);
}

// sums += (or, where FIRST, =) the next N rows.
template <typename T, int N, bool FIRST>
QTS_INLINE void add_rows(const T* const* rows, const float* weights, int64_t start, int64_t width, float* sums) {
  const T* from[N];
  Vec weight[N];
  for (int n = 0; n < N; ++n) {
    from[n] = rows[n] + start;
    weight[n] = broadcast(weights[n]);
  }
  for (int64_t j = 0; j < width; j += LANES) {
    const int64_t part = width - j < LANES ? width - j : LANES;
    Vec sum = FIRST ? weight[0] * get_row(from[0] + j, part) : load(sums + j);
    for (int n = FIRST ? 1 : 0; n < N; ++n) sum = fma(weight[n], get_row(from[n] + j, part), sum);
    store(sums + j, sum);
  }
}

template <typename T, bool FIRST>
void add_up_to_four(const T* const* rows, const float* weights, int64_t count, int64_t start, int64_t width,
                    float* sums) {
  switch (count) {
    case 1: return add_rows<T, 1, FIRST>(rows, weights, start, width, sums);
    case 2: return add_rows<T, 2, FIRST>(rows, weights, start, width, sums);
    case 3: return add_rows<T, 3, FIRST>(rows, weights, start, width, sums);
    default: return add_rows<T, 4, FIRST>(rows, weights, start, width, sums);
  }
}

template <typename T>
void store_sums(const float* sums, int64_t width, T* out) {
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) store(out + j, load(sums + j));
  if (j < width) store_part(out + j, load(sums + j), width - j);
}

template <typename T>
void weighted_typed(const T* const* rows, const float* weights, int64_t count, int64_t columns, Element out_type,
                    void* out) {
  float sums[kChunk];
  for (int64_t start = 0; start < columns; start += kChunk) {
    const int64_t width = columns - start < kChunk ? columns - start : kChunk;
    if (count == 0) __builtin_memset(sums, 0, sizeof(sums));
    if (count > 0) add_up_to_four<T, true>(rows, weights, count, start, width, sums);
    for (int64_t i = 4; i < count; i += 4)
      add_up_to_four<T, false>(rows + i, weights + i, count - i, start, width, sums);
    switch (out_type) {
      case Element::fp32: store_sums(sums, width, (float*)out + start); break;
      case Element::bf16: store_sums(sums, width, (bf16*)out + start); break;
      case Element::fp16: store_sums(sums, width, (fp16*)out + start); break;
    }
  }
}

}  // namespace

void weighted_rows(Element type, const void* const* rows, const float* weights, int64_t count, int64_t columns,
                   Element out_type, void* out) {
  switch (type) {
    case Element::fp32: weighted_typed((const float* const*)rows, weights, count, columns, out_type, out); break;
    case Element::bf16: weighted_typed((const bf16* const*)rows, weights, count, columns, out_type, out); break;
    case Element::fp16: weighted_typed((const fp16* const*)rows, weights, count, columns, out_type, out); break;
  }
}

}  // namespace qts::QTS_ISA
