// The product of a tile: rows of packed queries times a panel of packed keys. Included after pack.inl.

namespace qts::QTS_ISA {
namespace {

// A tile of scores, one row of keys after another.
struct alignas(64) Tile {
  float at[TILE_ROWS][TILE_KEYS];
};

// What a panel of keys needs beside its packed words.
struct alignas(64) Panel {
  const uint32_t* words;
  int64_t steps;
  float factor[TILE_KEYS];  // scale * log2(e) * key_scale
  int32_t key[TILE_KEYS];   // ascending; the largest integer, which no row sees, where there is no key
};

// tile = (packed query rows x packed panel) * factor. Rounded here, by itself, so that both passes see the same score
// and no score exceeds its row's lse.
#if defined(QTS_AMX_BF16)
template <typename Dot>
__attribute__((noinline)) void product(const uint32_t* query, const Panel& panel, Tile& tile) {
  static_assert(TILE_ROWS == 16 && TILE_VECS == 4 && LANES == 16);
  constexpr int64_t ROW = TILE_KEYS * sizeof(float);
  const uint32_t* key = panel.words;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < panel.steps; step += LANES) {
    _tile_loadd(4, query + step, panel.steps * sizeof(uint32_t));
    _tile_loadd(5, key, ROW);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, key + LANES, ROW);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, key + 2 * LANES, ROW);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, key + 3 * LANES, ROW);
    _tile_dpbf16ps(3, 4, 5);
    key += LANES * TILE_KEYS;
  }
  _tile_stored(0, tile.at[0], ROW);
  _tile_stored(1, tile.at[0] + LANES, ROW);
  _tile_stored(2, tile.at[0] + 2 * LANES, ROW);
  _tile_stored(3, tile.at[0] + 3 * LANES, ROW);
  Vec factor[TILE_VECS];
  for (int j = 0; j < TILE_VECS; ++j) factor[j] = load(panel.factor + j * LANES);
  for (int i = 0; i < TILE_ROWS; ++i) {
    for (int j = 0; j < TILE_VECS; ++j) store(tile.at[i] + j * LANES, load(tile.at[i] + j * LANES) * factor[j]);
  }
}
#else
template <typename Dot>
__attribute__((noinline)) void product(const uint32_t* query, const Panel& panel, Tile& tile) {
  Vec sum[TILE_ROWS][TILE_VECS] = {};
  const uint32_t* key = panel.words;
  for (int64_t step = 0; step < panel.steps; ++step) {
    Vec k[TILE_VECS];
#pragma GCC unroll 8
    for (int j = 0; j < TILE_VECS; ++j) k[j] = load_as<Vec>(key + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; ++i) {
      const Vec q = Dot::broadcast_word(query + i);
#pragma GCC unroll 8
      for (int j = 0; j < TILE_VECS; ++j) sum[i][j] = Dot::add(q, k[j], sum[i][j]);
    }
    query += TILE_ROWS;
    key += TILE_KEYS;
  }
#pragma GCC unroll 8
  for (int j = 0; j < TILE_VECS; ++j) {
    const Vec factor = load(panel.factor + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; ++i) store(tile.at[i] + j * LANES, sum[i][j] * factor);
  }
}
#endif

}  // namespace
}  // namespace qts::QTS_ISA
