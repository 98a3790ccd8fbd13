// How rows of queries and keys are packed: 32-bit words that a multiply-add takes, tile by tile and then step by step,
// so that the inner loop reads both from front to back. A word is a float, or a pair of bf16 for vdpbf16ps and AMX.

namespace qts::QTS_ISA {
namespace {

using relevance::Head;
using relevance::Type;

// As many sums as fit the registers, beside a row of keys and a broadcast query: 24 of 32, 12 of 16 and 8 of 16;
// with AMX 4 of 8, each 16 x 16.
#if defined(QTS_AMX_BF16)
constexpr int TILE_ROWS = 16, TILE_VECS = 4, GROUP_ROWS = 32;
#elif defined(QTS_AVX512)
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
#if defined(QTS_AMX_BF16)
  static int64_t words(int64_t head_dim) { return (head_dim + 2 * LANES - 1) / (2 * LANES) * LANES; }
#else
  static int64_t words(int64_t head_dim) { return (head_dim + 1) / 2; }
#endif
  static QTS_INLINE Vec load_words(const char* from, int64_t n) {
    return (Vec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), from);
  }
};
#else
using Bf16 = Converted<bf16>;
#endif

#if defined(QTS_AMX_BF16)
// Row by row: a tile of queries is loaded with a stride.
template <typename Source>
void pack_query(const char* from, int64_t head_dim, int64_t row, uint32_t* packed) {
  const int64_t words = Source::words(head_dim), bytes = head_dim * sizeof(bf16);
  char* to = reinterpret_cast<char*>(packed + row * words);
  __builtin_memcpy(to, from, bytes);
  __builtin_memset(to + bytes, 0, words * sizeof(uint32_t) - bytes);
}
#else
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
#endif

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
        const bool there = first + i < n;
        const char* at = from + key[there ? first + i : 0] * head.key_stride;
        // A panel ahead where the keys are consecutive.
        __builtin_prefetch(at + TILE_KEYS * head.key_stride, 0, 2);
        row[i] = Source::load_words(at, there ? elements : 0);
      }
#if defined(QTS_AMX_BF16)
      // A product for nobody: without one for some 0.3 us the unit goes to sleep, and then needs 0.4 us to wake.
      _tile_dpbf16ps(0, 4, 5);
#endif
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
