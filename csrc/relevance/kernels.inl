// Relevance's kernels, compiled once an instruction set; kernels.h says what each does.

#include "cpu/simd.inl"
#include "cpu/transpose.inl"
#include "relevance/pack.inl"
#include "relevance/product.inl"

namespace qts::QTS_ISA {
namespace {

using relevance::Bounds;
using relevance::Head;
using relevance::Type;

constexpr float LOWEST = -3.402823466e38f;
constexpr float HIGHEST = 3.402823466e38f;
constexpr float INFINITE = __builtin_inff();

// How far a row's maximum may rise, in powers of two, above the score that its exponentials are taken against. That
// score's own term then puts the sum above 1 by more than rounding can take: no score exceeds its row's lse.
constexpr float RISE = 8;

// What a thread needs of the machine while it runs a kernel.
struct Machine {
#if defined(QTS_AMX_BF16)
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  Machine() { _tile_loadconfig(&tiles); }
  ~Machine() { _tile_release(); }
#endif
};

// -inf where the row does not see the key.
void mask(const int32_t* limit, const Panel& panel, Tile& tile) {
  for (int i = 0; i < TILE_ROWS; ++i) {
    const VecI end = VecI{} + limit[i];
    for (int j = 0; j < TILE_VECS; ++j) {
      float* at = tile.at[i] + j * LANES;
      store(at, select(load_as<VecI>(panel.key + j * LANES) < end, load(at), broadcast(-INFINITE)));
    }
  }
}

// Calls use(row, tile) for each tile of rows that sees one of the n keys.
template <typename Source, typename Use>
QTS_INLINE void for_each_tile(const Head& head, const int32_t* key, int64_t n, uint32_t* words, Use use) {
  Panel panel;
  panel.words = words;
  panel.steps = Source::words(head.head_dim);
  for (int64_t i = 0; i < TILE_KEYS; ++i) {
    panel.key[i] = i < n ? key[i] : INT32_MAX;
    panel.factor[i] = i >= n ? 0.0f : head.key_scale ? head.factor * head.key_scale[key[i]] : head.factor;
  }
  pack_panel<Source>(head, key, n, words);
  Tile tile;
  for (int64_t row = 0; row < head.rows; row += TILE_ROWS) {
    int32_t least = head.limit[row], most = least;
    for (int i = 1; i < TILE_ROWS; ++i) {
      const int32_t limit = head.limit[row + i];
      least = limit < least ? limit : least;
      most = limit > most ? limit : most;
    }
    if (most <= panel.key[0]) continue;
    product<typename Source::Dot>(head.query + row * panel.steps, panel, tile);
    if (least <= panel.key[TILE_KEYS - 1]) mask(head.limit + row, panel, tile);
    use(row, tile);
  }
}

// The softmax statistics of one row over one tile: running[0] sums 2^(s - reference), running[1] is the maximum, lane
// by lane. The reference is the row's, not the lane's, and follows the maximum loosely: a tile costs TILE_VECS
// exponentials and a branch that is nearly always foreseen.
QTS_INLINE void add_to_row(const float* score, float& reference, float* running) {
  Vec s[TILE_VECS];
  for (int j = 0; j < TILE_VECS; ++j) s[j] = load(score + j * LANES);
  Vec top = s[0];
  for (int j = 1; j < TILE_VECS; ++j) top = vmax(s[j], top);
  store(running + LANES, vmax(top, load(running + LANES)));
  Vec sum = load(running);
  if (any_greater(top, broadcast(reference + RISE))) {
    // Finite, so that an infinite score makes the sum infinite, not NaN.
    float higher = max_lanes(vmax(top, broadcast(reference)));
    higher = higher < HIGHEST ? higher : HIGHEST;
    sum *= exp2(broadcast(reference - higher));
    reference = higher;
  }
  const Vec m = broadcast(reference);
  for (int j = 0; j < TILE_VECS; ++j) sum += exp2(s[j] - m);
  store(running, sum);
}

// The row's maximum, in place of the reference, and the sum of 2^(s - max).
QTS_INLINE void finish_row(const float* running, float& max, float& sum) {
  const float reference = max, top = max_lanes(load(running + LANES));
  max = top < HIGHEST ? top : HIGHEST;
  float rescale[LANES];
  store(rescale, exp2(broadcast(reference - max)));
  sum = sum_lanes(load(running)) * rescale[0];
}

// top[j] = max(top[j], max over the tile's rows of s - less[i]); NaN is passed over.
QTS_INLINE void add_to_columns(const Tile& tile, const float* less, Vec (&top)[TILE_VECS]) {
  for (int i = 0; i < TILE_ROWS; ++i) {
    const Vec l = broadcast(less[i]);
    for (int j = 0; j < TILE_VECS; ++j) top[j] = vmax(load(tile.at[i] + j * LANES) - l, top[j]);
  }
}

QTS_INLINE void load_columns(const float* from, Vec (&to)[TILE_VECS]) {
  for (int j = 0; j < TILE_VECS; ++j) to[j] = load(from + j * LANES);
}

QTS_INLINE void store_columns(float* to, const Vec (&from)[TILE_VECS]) {
  for (int j = 0; j < TILE_VECS; ++j) store(to + j * LANES, from[j]);
}

template <typename Source>
void row_statistics(const Head& head, int64_t begin, int64_t end, const Bounds* bounds, uint32_t* words, float* running,
                    float* max, float* sum) {
  [[maybe_unused]] const Machine machine;
  for (int64_t r = 0; r < head.rows; ++r) {
    max[r] = LOWEST;
    store(running + 2 * r * LANES, Vec{});
    store(running + (2 * r + 1) * LANES, broadcast(LOWEST));
  }
  for (int64_t m = begin; m < end; m += TILE_KEYS) {
    int32_t key[TILE_KEYS];
    for (int i = 0; i < TILE_KEYS; ++i) key[i] = static_cast<int32_t>(m + i);
    for (int64_t row = 0; bounds != nullptr && row < head.rows; row += GROUP_ROWS) {
      for (int i = 0; i < TILE_KEYS; ++i) bounds->at[row / GROUP_ROWS * bounds->stride + m + i] = -INFINITE;
    }
    for_each_tile<Source>(head, key, end - m, words, [&](int64_t row, const Tile& tile) {
      for (int i = 0; i < TILE_ROWS; ++i) add_to_row(tile.at[i], max[row + i], running + 2 * (row + i) * LANES);
      if (bounds == nullptr) return;
      float* const at = bounds->at + row / GROUP_ROWS * bounds->stride + m;
      Vec top[TILE_VECS];
      load_columns(at, top);
      add_to_columns(tile, bounds->estimate + row, top);
      store_columns(at, top);
    });
  }
  for (int64_t r = 0; r < head.rows; ++r) finish_row(running + 2 * r * LANES, max[r], sum[r]);
}

template <typename Source>
void column_max(const Head& head, const int32_t* key, int64_t n, const float* lse, uint32_t* words, float* best,
                int64_t first_row, int64_t* best_row) {
  [[maybe_unused]] const Machine machine;
  Vec top[TILE_VECS];
  load_columns(best, top);
  if (best_row == nullptr) {
    for_each_tile<Source>(head, key, n, words,
                          [&](int64_t row, const Tile& tile) { add_to_columns(tile, lse + row, top); });
  } else {
    VecI which[TILE_VECS];
    for (int j = 0; j < TILE_VECS; ++j) which[j] = VecI{} - 1;
    for_each_tile<Source>(head, key, n, words, [&](int64_t row, const Tile& tile) {
      for (int i = 0; i < TILE_ROWS; ++i) {
        const Vec l = broadcast(lse[row + i]);
        for (int j = 0; j < TILE_VECS; ++j) {
          const Vec v = load(tile.at[i] + j * LANES) - l;
          // NaN is taken, and then kept: nothing is greater.
          const VecI takes = (v > top[j]) | ((v != v) & (top[j] == top[j]));
          top[j] = select(takes, v, top[j]);
          which[j] = takes ? VecI{} + static_cast<int32_t>(row + i) : which[j];
        }
      }
    });
    int32_t row[TILE_KEYS];
    __builtin_memcpy(row, which, sizeof(row));
    for (int i = 0; i < TILE_KEYS; ++i) best_row[i] = row[i] < 0 ? best_row[i] : first_row + row[i];
  }
  store_columns(best, top);
}

template <typename Source>
void column_sum(const Head& head, const int32_t* key, int64_t n, const float* lse, uint32_t* words, float* total) {
  [[maybe_unused]] const Machine machine;
  for_each_tile<Source>(head, key, n, words, [&](int64_t row, const Tile& tile) {
    for (int j = 0; j < TILE_VECS; ++j) {
      Vec sum{};
      for (int i = 0; i < TILE_ROWS; ++i) sum += exp2(load(tile.at[i] + j * LANES) - broadcast(lse[row + i]));
      store(total + j * LANES, load(total + j * LANES) + sum);
    }
  });
}

void exp2_all(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, exp2(load(x + i)));
}

template <typename Source>
constexpr relevance::Kernels kernels_of() {
  return {TILE_ROWS,
          TILE_KEYS,
          LANES,
          GROUP_ROWS,
          Source::words,
          pack_query<Source>,
          row_statistics<Source>,
          column_max<Source>,
          column_sum<Source>,
          exp2_all};
}

}  // namespace

#if defined(QTS_AMX_BF16)
const relevance::Kernels& relevance_kernels() {
  static constexpr relevance::Kernels bf16 = kernels_of<Bf16>();
  return bf16;
}
#else
const relevance::Kernels& relevance_kernels(Type type) {
  static constexpr relevance::Kernels f32 = kernels_of<Float32>(), f16 = kernels_of<Converted<fp16>>(),
                                      bf16 = kernels_of<Bf16>();
  return type == Type::f32 ? f32 : type == Type::f16 ? f16 : bf16;
}
#endif

}  // namespace qts::QTS_ISA
