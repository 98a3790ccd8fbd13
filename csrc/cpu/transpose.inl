// Transposition of LANES x LANES words in registers. Included after simd.inl.

namespace qts::QTS_ISA {
namespace {

// One step of the transposition of a LANES x LANES block: swaps, between a row and the row DISTANCE below it, the
// off-diagonal halves of each group of 2 * DISTANCE lanes.
template <int DISTANCE, int... I>
QTS_INLINE void swap_halves(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec upper = __builtin_shufflevector(a, b, (I & DISTANCE ? LANES + I - DISTANCE : I)...);
  b = __builtin_shufflevector(a, b, (I & DISTANCE ? LANES + I : I + DISTANCE)...);
  a = upper;
}

template <int DISTANCE>
QTS_INLINE void transpose(Vec (&row)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (!(i & DISTANCE)) swap_halves<DISTANCE>(row[i], row[i + DISTANCE], std::make_integer_sequence<int, LANES>{});
  }
  if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(row);
}

}  // namespace
}  // namespace qts::QTS_ISA
