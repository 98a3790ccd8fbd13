// Approximate products of rows in bf16. Included after cpu/target_amx_bf16.h; see cpu/isa.h for the one rule.

#include "cpu/simd.inl"
#include "cpu/transpose.inl"

namespace qts::QTS_ISA {
namespace {

using screen::kPanelRows;
using screen::kTileColumns;

constexpr int64_t kTile = kPanelRows * kTileColumns;
// Tiles of a chunk: those of two panels of a, 64 KB, stay in the second cache while b streams past.
constexpr int64_t kChunkTiles = 32;

static_assert(LANES == kPanelRows);

// The first n, 16 at most, and zeros behind them.
QTS_INLINE Vec load_some(const float* from, int64_t n) {
  return n >= LANES ? load(from) : n > 0 ? load_part(from, n) : Vec{};
}

QTS_INLINE float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

// Two vectors as the bf16 of 32 columns, and what that took off added up in squares.
QTS_INLINE Vec round_pairs(Vec low, Vec high, Vec& square) {
  const auto rounded = bit_cast<VecU>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  const auto first = (VecU)_mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)rounded));
  const auto second = (VecU)_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)rounded, 1));
  const Vec off_low = low - bit_cast<Vec>(first << 16), off_high = high - bit_cast<Vec>(second << 16);
  square = fma(off_low, off_low, square);
  square = fma(off_high, off_high, square);
  return bit_cast<Vec>(rounded);
}

void pack(const float* const* rows, const float* scale, const float* center, int64_t columns, bool right, bf16* panel,
          const screen::Facts& facts) {
  Vec square[LANES] = {}, off[LANES] = {}, along[LANES] = {};
  for (int64_t first = 0; first < columns; first += kTileColumns, panel += kTile) {
    const int64_t width = columns - first;
    const Vec middle[2] = {load_some(center + first, width), load_some(center + first + LANES, width - LANES)};
    Vec tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      tile[i] = Vec{};
      if (rows[i] == nullptr) continue;
      const float* from = rows[i] + first;
      const Vec factor = broadcast(scale[i]);
      const Vec low = load_some(from, width) * factor - middle[0];
      const Vec high = load_some(from + LANES, width - LANES) * factor - middle[1];
      square[i] = fma(high, high, fma(low, low, square[i]));
      along[i] = fma(high, middle[1], fma(low, middle[0], along[i]));
      tile[i] = round_pairs(low, high, off[i]);
    }
    if (right) transpose<LANES / 2>(tile);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) __builtin_memcpy(panel + i * kTileColumns, &tile[i], sizeof(Vec));
  }
  for (int i = 0; i < LANES; ++i) {
    facts.norm[i] = root(sum_lanes(square[i]));
    facts.residual[i] = root(sum_lanes(off[i]));
    facts.offset[i] = sum_lanes(along[i]);
  }
}

struct Tiles {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  Tiles() { _tile_loadconfig(&config); }
  ~Tiles() { _tile_release(); }
};

// out += two panels of a by two of b, tiles [start, stop) of their columns.
QTS_INLINE void multiply_panels(const bf16* a, const bf16* b, int64_t panel, int64_t start, int64_t stop, float* out,
                                int64_t stride) {
  const int64_t row = stride * 4;
  float* const low = out + 16 * stride;
  _tile_loadd(0, out, row);
  _tile_loadd(1, out + 16, row);
  _tile_loadd(2, low, row);
  _tile_loadd(3, low + 16, row);
  for (int64_t t = start; t < stop; ++t) {
    _tile_loadd(4, a + t * kTile, 64);
    _tile_loadd(6, b + t * kTile, 64);
    _tile_loadd(7, b + panel + t * kTile, 64);
    _tile_loadd(5, a + panel + t * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, row);
  _tile_stored(1, out + 16, row);
  _tile_stored(2, low, row);
  _tile_stored(3, low + 16, row);
}
void multiply(const bf16* a, int64_t panels_a, const bf16* b, int64_t panels_b, int64_t columns, float* out) {
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns, panel = tiles * kTile, stride = 16 * panels_b;
  __builtin_memset(out, 0, 16 * panels_a * stride * sizeof(float));
  [[maybe_unused]] const Tiles configured;
  for (int64_t start = 0; start < tiles; start += kChunkTiles) {
    const int64_t stop = tiles - start < kChunkTiles ? tiles : start + kChunkTiles;
    for (int64_t m = 0; m < panels_a; m += 2)
      for (int64_t n = 0; n < panels_b; n += 2)
        multiply_panels(a + m * panel, b + n * panel, panel, start, stop, out + 16 * (m * stride + n), stride);
  }
}

int64_t candidates(const float* products, const screen::Facts& right, int64_t count, float a, float b, float slack,
                   int32_t* found) {
  const VecI lane = lane_index();
  const Vec none = broadcast(-__builtin_inff());
  const auto similarity = [&](int64_t j) { return load(products + j) + load(right.offset + j); };
  const auto margin = [&](int64_t j) {
    return fma(load(right.norm + j), broadcast(a), fma(load(right.residual + j), broadcast(b), broadcast(slack)));
  };
  Vec most = none;
  for (int64_t j = 0; j < count; j += LANES) {
    const Vec low = similarity(j) - margin(j);
    most = vmax(select(lane < (VecI{} + (int32_t)(count - j)), low, none), most);
  }
  const Vec least = broadcast(max_lanes(most));
  int64_t kept = 0;
  for (int64_t j = 0; j < count; j += LANES) {
    const Vec high = similarity(j) + margin(j);
    const int64_t left = count - j;
    const __mmask16 inside = left < LANES ? (__mmask16)((1 << left) - 1) : (__mmask16)0xffff;
    const __mmask16 keep = _mm512_mask_cmp_ps_mask(inside, (__m512)high, (__m512)least, _CMP_GE_OQ);
    _mm512_storeu_si512(found + kept, _mm512_maskz_compress_epi32(keep, (__m512i)(lane + (int32_t)j)));
    kept += __builtin_popcount(keep);
  }
  return kept;
}

constexpr screen::Kernels kScreen{pack, multiply, candidates};

}  // namespace

const screen::Kernels& screen_kernels() { return kScreen; }

}  // namespace qts::QTS_ISA
