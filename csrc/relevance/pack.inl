// How rows of queries and keys are packed: 32-bit words that a multiply-add takes, tile by tile and then step by step,
// so that the inner loop reads both from front to back. A word is a float, or a pair of bf16 for vdpbf16ps.

namespace qts::QTS_ISA {
namespace {

using relevance::Head;
using relevance::Type;

// As many sums as fit the registers, beside a row of keys and a broadcast query: 24 of 32, 12 of 16 and 8 of 16.
#if defined(QTS_AVX512)
constexpr int TILE_ROWS = 8, TILE_VECS = 3, GROUP_ROWS = 32;
#elif defined(QTS_AVX2)
constexpr int TILE_ROWS = 6, TILE_VECS = 2, GROUP_ROWS = 36;
#else
constexpr int TILE_ROWS = 4, TILE_VECS = 2, GROUP_ROWS = 32;
#endif
constexpr int TILE_KEYS = TILE_VECS * LANES;
static_assert(TILE_KEYS <= relevance::MAX_TILE_KEYS);

struct FloatDot {
  static QTS_INLINE Vec broadcast_word(const uint32_t* word) { return broadcast(load_as<float>(word)); }
  static QTS_INLINE Vec add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// Elements of type T, converted to float as they are packed.
template <typename T>
struct Converted {
  using Dot = FloatDot;
  static constexpr int64_t ELEMENTS_PER_WORD = 1;
  static int64_t words(int64_t head_dim) { return head_dim; }
  // The words of the first n <= LANES elements at `from`, zeros behind them.
  static QTS_INLINE Vec load_words(const char* from, int64_t n) {
    const T* at = reinterpret_cast<const T*>(from);
    return n == LANES ? load(at) : load_part(at, n);
  }
  static constexpr int64_t WORD_BYTES = sizeof(T);
};

using Float32 = Converted<float>;

#if defined(QTS_AVX512_BF16)
// acc += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: exact products, fp32 sums, twice the rate of fp32.
struct PairDot {
  static QTS_INLINE Vec broadcast_word(const uint32_t* word) {
    return bit_cast<Vec>(VecI{} + load_as<int32_t>(word));
  }
  static QTS_INLINE Vec add(Vec a, Vec b, Vec c) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};

struct Bf16 {
  using Dot = PairDot;
  static constexpr int64_t ELEMENTS_PER_WORD = 2, WORD_BYTES = 4;
  static int64_t words(int64_t head_dim) { return (head_dim + 1) / 2; }
  static QTS_INLINE Vec load_words(const char* from, int64_t n) {
    if (n == 2 * LANES) return load_as<Vec>(from);
    uint16_t padded[2 * LANES] = {};
    __builtin_memcpy(padded, from, n * sizeof(uint16_t));
    return load_as<Vec>(padded);
  }
};
#else
using Bf16 = Converted<bf16>;
#endif

template <typename Source>
void pack_query(const char* from, int64_t head_dim, int64_t row, uint32_t* packed) {
  const int64_t words = Source::words(head_dim);
  uint32_t* to = packed + row / TILE_ROWS * TILE_ROWS * words + row % TILE_ROWS;
  for (int64_t word = 0; word < words; word += LANES) {
    const int64_t left = head_dim - word * Source::ELEMENTS_PER_WORD;
    const int64_t n = left < LANES * Source::ELEMENTS_PER_WORD ? left : LANES * Source::ELEMENTS_PER_WORD;
    uint32_t part[LANES];
    const Vec loaded = Source::load_words(from + word * Source::WORD_BYTES, n);
    __builtin_memcpy(part, &loaded, sizeof(part));
    for (int64_t i = 0; i < LANES && word + i < words; ++i) to[(word + i) * TILE_ROWS] = part[i];
  }
}

// The n keys of index key[i], word by word: panel[word][i]; zeros behind the last.
template <typename Source>
void pack_panel(const Head& head, const int32_t* key, int64_t n, uint32_t* panel) {
  const int64_t words = Source::words(head.head_dim), block = LANES * Source::ELEMENTS_PER_WORD;
  for (int64_t first = 0; first < TILE_KEYS; first += LANES) {
    for (int64_t word = 0; word < words; word += LANES) {
      const int64_t left = head.head_dim - word * Source::ELEMENTS_PER_WORD;
      const int64_t elements = left < block ? left : block;
      const char* from = head.key + word * Source::WORD_BYTES;
      Vec row[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        row[i] = first + i < n ? Source::load_words(from + key[first + i] * head.key_stride, elements) : Vec{};
      }
      transpose<LANES / 2>(row);
      uint32_t* to = panel + word * TILE_KEYS + first;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        if (word + i < words) __builtin_memcpy(to + i * TILE_KEYS, &row[i], sizeof(Vec));
      }
    }
  }
}

}  // namespace
}  // namespace qts::QTS_ISA
