// A vector of QTS_LANES floats: what the kernels need of it, on compiler vector types, with intrinsics where those are
// not enough. Included after a target header, once in a file; see isa.h.

#define QTS_INLINE inline __attribute__((always_inline))

namespace qts::QTS_ISA {
namespace {

constexpr int LANES = QTS_LANES;
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecU __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecH __attribute__((vector_size(LANES * 2)));

// Less zero, which compiles to the broadcast alone; plus zero would turn -0 into +0.
QTS_INLINE Vec broadcast(float x) { return x - Vec{}; }

template <typename To, typename From>
QTS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Lane by lane mask ? a : b. The mask is a comparison of vectors.
QTS_INLINE Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }

// max(a, b), min(a, b); b where either is NaN (as x86 has it): write a bound first to let NaN through.
QTS_INLINE Vec vmax(Vec a, Vec b) {
#if defined(QTS_AVX512)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(QTS_AVX2)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

QTS_INLINE Vec vmin(Vec a, Vec b) {
#if defined(QTS_AVX512)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(QTS_AVX2)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// a * b + c, rounded once where the machine can.
QTS_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(QTS_AVX512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(QTS_AVX2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// 2^f for f in [-0.5, 0.5]: minimax in relative error, 2^-23.1.
QTS_INLINE Vec exp2_poly(Vec f) {
  Vec p = broadcast(0x1.5bba14p-10f);
  p = fma(p, f, broadcast(0x1.3cea88p-7f));
  p = fma(p, f, broadcast(0x1.c6b752p-5f));
  p = fma(p, f, broadcast(0x1.ebf9bcp-3f));
  p = fma(p, f, broadcast(0x1.62e42ap-1f));
  return fma(p, f, broadcast(1.0f));
}

// 2^x within 2.2 ulp (measured); 2^inf, 2^-inf and NaN as they should be; without AVX-512 0 in place of a subnormal.
QTS_INLINE Vec exp2(Vec x) {
#if defined(QTS_AVX512)
  // vreduceps gives x minus the nearest integer, and 0 for an infinity; vscalefps multiplies by a power of two.
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 0);
  return (Vec)_mm512_scalef_ps((__m512)exp2_poly(f), _mm512_roundscale_ps((__m512)x, 0));
#else
  // Clamped, so that the exponent field is 0 (the result is 0) at the bottom and that of infinity at the top.
  x = vmin(broadcast(128.0f), vmax(broadcast(-127.0f), x));
  // Adding and taking off 1.5 * 2^23 rounds to the nearest integer, which the low bits of the sum then hold.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  const VecI exponent = bit_cast<VecI>(shifted) + 127;
  return exp2_poly(f) * bit_cast<Vec>(exponent << 23);
#endif
}

template <typename T>
QTS_INLINE T load_as(const void* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

QTS_INLINE Vec load(const float* from) { return load_as<Vec>(from); }

QTS_INLINE Vec load(const bf16* from) {
  return bit_cast<Vec>(__builtin_convertvector(load_as<VecH>(from), VecU) << 16);
}

QTS_INLINE Vec load(const fp16* from) {
#if defined(QTS_AVX512)
  return (Vec)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(QTS_AVX2)
  return (Vec)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  const VecU h = __builtin_convertvector(load_as<VecH>(from), VecU);
  // The exponent is rebased by a multiplication, which is right for subnormals too; inf and NaN get theirs back.
  VecU magnitude = bit_cast<VecU>(bit_cast<Vec>((h & 0x7fff) << 13) * 0x1p112f);
  magnitude |= (VecU)((h & 0x7fff) >= 0x7c00) & 0x7f800000u;
  return bit_cast<Vec>(magnitude | (h & 0x8000) << 16);
#endif
}

QTS_INLINE void store(float* to, Vec x) { __builtin_memcpy(to, &x, sizeof(x)); }

// Rounded to nearest, ties to even; NaN stays NaN.
QTS_INLINE void store(bf16* to, Vec x) {
  const VecU u = bit_cast<VecU>(x);
  const VecU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const VecH h = __builtin_convertvector((VecI)(x == x) ? rounded : VecU{} + 0x7fc0, VecH);
  __builtin_memcpy(to, &h, sizeof(h));
}

QTS_INLINE void store(fp16* to, Vec x) {
#if defined(QTS_AVX512)
  const __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(QTS_AVX2)
  const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const VecU u = bit_cast<VecU>(x) & 0x7fffffff;
  const VecU sign = bit_cast<VecU>(x) >> 16 & 0x8000;
  // Rebase the exponent and round in integers; below 2^-14 let an addition round at 2^-24; from 65520 on infinity.
  const VecU normal = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;
  const VecU subnormal = bit_cast<VecU>(bit_cast<Vec>(u) + 0.5f) - 0x3f000000;
  VecU magnitude = (VecI)(u < (113u << 23)) ? subnormal : normal;
  magnitude = (VecI)(u >= 0x477ff000u) ? VecU{} + 0x7c00 : magnitude;
  magnitude = (VecI)(u > 0x7f800000u) ? VecU{} + 0x7e00 : magnitude;
  const VecH h = __builtin_convertvector(magnitude | sign, VecH);
#endif
  __builtin_memcpy(to, &h, sizeof(h));
}

// The first n < LANES elements, zeros behind them.
template <typename T>
QTS_INLINE Vec load_part(const T* from, int64_t n) {
  T padded[LANES] = {};
  __builtin_memcpy(padded, from, n * sizeof(T));
  return load(padded);
}

template <typename T>
QTS_INLINE void store_part(T* to, Vec x, int64_t n) {
  T padded[LANES];
  store(padded, x);
  __builtin_memcpy(to, padded, n * sizeof(T));
}

// The lanes' number in one: 0, 1, 2, ...
QTS_INLINE VecI lane_index() {
  int32_t lane[LANES];
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return load_as<VecI>(lane);
}

// Whether a > b in any lane.
QTS_INLINE bool any_greater(Vec a, Vec b) {
#if defined(QTS_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(QTS_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  const VecI greater = a > b;
  int32_t any = 0;
  for (int i = 0; i < LANES; ++i) any |= greater[i];
  return any != 0;
#endif
}

// Lane i + DISTANCE, around the end, in place of lane i.
template <int DISTANCE, int... I>
QTS_INLINE Vec rotate(Vec x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + DISTANCE) % LANES)...);
}

template <int DISTANCE = LANES / 2>
QTS_INLINE float max_lanes(Vec x) {
  x = vmax(x, rotate<DISTANCE>(x, std::make_integer_sequence<int, LANES>{}));
  if constexpr (DISTANCE > 1) return max_lanes<DISTANCE / 2>(x);
  return x[0];
}

template <int DISTANCE = LANES / 2>
QTS_INLINE float sum_lanes(Vec x) {
  x += rotate<DISTANCE>(x, std::make_integer_sequence<int, LANES>{});
  if constexpr (DISTANCE > 1) return sum_lanes<DISTANCE / 2>(x);
  return x[0];
}

}  // namespace
}  // namespace qts::QTS_ISA
