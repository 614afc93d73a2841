// Products of bytes by tiles of 16 rows of 64 bytes. Weights are the signed operand as they lie in memory, or unpacked;
// codes are the other one, which wants four codes of each of 16 rows side by side, and are transposed once for all
// channels of a panel.
#pragma once

#include "../avx512/bytes.h"

#define CG_DPBUSD _mm512_dpbusd_epi32
#include "../x86/dot_fours.h"

namespace cg::CG_ISA {
namespace {

constexpr int64_t kTile = 16, kTileCodes = 64;
constexpr int64_t kTileBytes = kTile * kTileCodes;
constexpr int64_t kPairRows = 2 * kTile;  // or channels: two tiles of each make four of sums

// Fewer rows leave most of a tile empty.
constexpr int64_t kMinRows = 8;

constexpr int64_t kMaxPanelTiles = kMaxPanelCodes / kTileCodes + 1;

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// g++'s tile instructions do not say which memory they read and write: stores must be done before, loads come after.
CG_HD void memory_barrier() { asm volatile("" ::: "memory"); }

// Others, such as oneDNN, rely on the configuration that they left.
class ConfiguredTiles {
 public:
  ConfiguredTiles() {
    _tile_storeconfig(&before_);
    memory_barrier();
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileCodes, config.rows[i] = kTile;
    load(config);
  }
  ~ConfiguredTiles() {
    if (before_.palette) load(before_);
    else _tile_release();
  }
  ConfiguredTiles(const ConfiguredTiles&) = delete;

 private:
  static CG_HD void load(const TileConfig& config) {
    asm volatile("" ::"r"(&config) : "memory");  // all of it, of which _tile_loadconfig names 8 bytes
    _tile_loadconfig(&config);
  }

  alignas(64) TileConfig before_;
};

// 64 codes of up to 16 rows; the last 32 are zero if there are no more.
void transpose_codes(const uint8_t* codes, int64_t stride, int64_t rows, bool whole, uint8_t* tile) {
  Register v[16];
  for (int64_t r = 0; r < kTile; ++r) {
    const uint8_t* row = codes + r * stride;
    v[r] = r >= rows ? Register{} : whole ? load_register(row) : load_lower_half(row);
  }
  transpose(v);
  for (int64_t i = 0; i < kTile; ++i) store_register(tile + i * kTileCodes, v[i]);
}

// Weights `tile` * 64 and the next of up to 16 channels, times 1 << kWeightShift.
template <int kWeightBits>
void unpack_tile(const DotPanel& a, const uint8_t* weights, int64_t channels, int64_t tile, uint8_t* to) {
  constexpr int64_t kTilesPerBlock = kPlanes<kWeightBits> / 2;  // 0: a tile is of two blocks
  for (int64_t c = 0; c < kTile; ++c, weights += a.weight_stride, to += kTileCodes) {
    if (c >= channels) {
      store_register(to, Register{});
    } else if constexpr (kWeightBits == 8) {
      const uint8_t* from = weights + tile * kTileCodes;
      store_register(to, 2 * tile + 2 <= a.blocks ? load_register(from) : load_lower_half(from));
    } else {
      const HalfRegister block = load_half(weights + tile / kTilesPerBlock * kWeightBlock);
      // The two planes are shifted to the top of each byte; what comes from a neighbor is masked away.
      const int up = 8 - kWeightBits * static_cast<int>(2 * (tile % kTilesPerBlock) + 1);
      const HalfRegister low = _mm256_sll_epi16(block, _mm_cvtsi32_si128(up));
      const HalfRegister high = _mm256_sll_epi16(block, _mm_cvtsi32_si128(up - kWeightBits));
      store_register(to, unpack_weights<kWeightBits, kPlanes<kWeightBits> - 1>(join_halves(low, high)));
    }
  }
}

// acc[r, c] += sums[c, r] of a tile.
void add_tile(const int32_t* sums, int64_t rows, int64_t channels, int shift, int32_t* acc, int64_t stride) {
  Register v[16];
  for (int64_t c = 0; c < kTile; ++c) v[c] = load_register(sums + c * kTile);
  transpose(v);
  const __mmask16 mask = static_cast<__mmask16>((1u << std::min(channels, kTile)) - 1);
  for (int64_t r = 0; r < std::min(rows, kTile); ++r) {
    int32_t* to = acc + r * stride;
    const Register sum = _mm512_srai_epi32(v[r], shift);
    _mm512_mask_storeu_epi32(to, mask, _mm512_add_epi32(_mm512_maskz_loadu_epi32(mask, to), sum));
  }
}

// 32 rows times 32 channels; codes are transposed, tiles of both groups of 16 rows in turn.
template <int kWeightBits>
void dot_tiles(const DotPanel& a, const uint8_t* codes, int64_t tiles, int64_t rows, int64_t channels,
               const uint8_t* weights, int32_t* acc) {
  alignas(64) uint8_t unpacked[2 * kTileBytes];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  memory_barrier();
  const bool as_they_lie = kWeightBits == 8 && channels >= kPairRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (as_they_lie && 2 * tile + 2 <= a.blocks) {
      const uint8_t* from = weights + tile * kTileCodes;
      _tile_loadd(4, from, a.weight_stride);
      _tile_loadd(5, from + kTile * a.weight_stride, a.weight_stride);
    } else {
      unpack_tile<kWeightBits>(a, weights, channels, tile, unpacked);
      unpack_tile<kWeightBits>(a, weights + kTile * a.weight_stride, channels - kTile, tile, unpacked + kTileBytes);
      memory_barrier();
      _tile_loadd(4, unpacked, kTileCodes);
      _tile_loadd(5, unpacked + kTileBytes, kTileCodes);
    }
    _tile_loadd(6, codes + 2 * tile * kTileBytes, kTileCodes);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
    if (rows > kTile) {
      _tile_loadd(7, codes + (2 * tile + 1) * kTileBytes, kTileCodes);
      _tile_dpbsud(2, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
  }
  alignas(64) int32_t sums[4][kTile * kTile];
  _tile_stored(0, sums[0], kTileCodes);
  _tile_stored(1, sums[1], kTileCodes);
  _tile_stored(2, sums[2], kTileCodes);
  _tile_stored(3, sums[3], kTileCodes);
  for (int i = 0; i < 4; ++i) {
    const int64_t first_row = i / 2 * kTile, first = i % 2 * kTile;
    if (rows > first_row && channels > first) {
      add_tile(sums[i], rows - first_row, channels - first, kWeightShift<kWeightBits>,
               acc + first_row * a.acc_stride + first, a.acc_stride);
    }
  }
}

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  if (a.rows < kMinRows) return dot_panel_by<FourProducts, kWeightBits>(a);
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  const int64_t tiles = (a.blocks * kCodes + kTileCodes - 1) / kTileCodes;
  alignas(64) uint8_t transposed[kMaxPanelTiles * 2 * kTileBytes];  // about 200 KB
  const ConfiguredTiles configured;
  for (int64_t row = 0; row < a.rows; row += kPairRows) {
    const int64_t rows = std::min(a.rows - row, kPairRows);
    for (int64_t i = 0; i < 2 * tiles; ++i) {
      const int64_t first = i % 2 * kTile, tile = i / 2;
      const uint8_t* from = a.codes + (row + first) * a.code_stride + tile * kTileCodes;
      const bool whole = (tile + 1) * kTileCodes <= a.blocks * kCodes;
      transpose_codes(from, a.code_stride, rows - first, whole, transposed + i * kTileBytes);
    }
    for (int64_t c = 0; c < a.channels; c += kPairRows) {
      dot_tiles<kWeightBits>(a, transposed, tiles, rows, a.channels - c, a.weights + c * a.weight_stride,
                             a.acc + row * a.acc_stride + c);
    }
  }
}

using Columns = NoColumns;

}  // namespace
}  // namespace cg::CG_ISA
