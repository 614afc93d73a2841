// Products of rows of codes and weights along the rows: a register of weights is unpacked once for each tile of rows. A
// set's dot.h says how products of bytes are added up: its Products.
#pragma once

#include <algorithm>
#include <utility>

#include "depthwise.h"
#include "unpack_weights.h"
#include "wide.h"

namespace cg::CG_ISA {
namespace {

constexpr int kBlocks = sizeof(Register) / kWeightBlock;  // of weights in a register
// Sums are kept in registers, of which there are 16, or 32 of the larger ones.
constexpr int kTileRows = 4, kTileChannels = kBlocks == 1 ? 2 : 4;

// g++ would load it again for each product, or add up in an order that takes more registers than there are.
CG_HD Register in_register(Register v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  if constexpr (kBlocks == 1) asm("" : "+x"(v));
#endif
  return v;
}

template <bool kWhole>
CG_HD Register load_weights(const uint8_t* weights) {
  if constexpr (kWhole) return load_register(weights);
  else return load_lower_half(weights);
}
template <int kWeightBits, bool kWhole>
CG_HD Register load_plane(const uint8_t* codes, int plane) {
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  codes += plane * kWeightBlock;
  if constexpr (!kWhole) return load_lower_half(codes);
  else if constexpr (kBlocks == 1 || kWeightBits == 8) return load_register(codes);
  else return join_halves(load_half(codes), load_half(codes + kCodes));
}

// body(Constant<i>{}) for each i below kCount.
template <int kCount, class Body>
CG_HD void for_each_constant(const Body& body) {
  const auto each = [&]<int... i>(std::integer_sequence<int, i...>)
                        __attribute__((always_inline)) { (body(Constant<i>{}), ...); };
  each(std::make_integer_sequence<int, kCount>{});
}

// Half as many of either, in 16 bits.
template <int kWeightBits, int kPlane, int kHalf>
CG_HD Register load_wide_plane(const uint8_t* codes) {
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  return widen_codes(load_half(codes + kPlane * kWeightBlock + kHalf * (kBlocks == 1 ? kWeightBlock / 2 : kCodes)));
}
template <int kWeightBits, int kPlane, int kHalf>
CG_HD Register unpack_wide_weights(const uint8_t* weights, Register packed) {
  if constexpr (kWeightBits == 8) {  // from memory it is one instruction
    return widen_weights(load_half(weights + kHalf * sizeof(HalfRegister)));
  } else {
    const Register w = unpack_weights<kWeightBits, kPlane>(packed);
    return widen_weights(kHalf ? high_half(w) : low_half(w));
  }
}

// sums[r][c] += products of the registers at these places of kRows rows of codes and kChannels rows of weights.
template <class Products, int kWeightBits, bool kWhole, int kRows, int kChannels>
CG_HD void add_products(const DotPanel& a, const uint8_t* codes, const uint8_t* weights,
                        Register (&sums)[kRows][kChannels]) {
  Register packed[kChannels];
  for (int c = 0; c < kChannels; ++c) packed[c] = load_weights<kWhole>(weights + c * a.weight_stride);
  constexpr int kParts = Products::kWide && kWhole ? 2 : 1;
  for_each_constant<kPlanes<kWeightBits> * kParts>([&](auto i) __attribute__((always_inline)) {
    constexpr int kPlane = i.value / kParts, kHalf = i.value % kParts;
    Register w[kChannels];
    for (int c = 0; c < kChannels; ++c) {
      if constexpr (!Products::kWide) w[c] = unpack_weights<kWeightBits, kPlane>(packed[c]);
      else w[c] = unpack_wide_weights<kWeightBits, kPlane, kHalf>(weights + c * a.weight_stride, packed[c]);
    }
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* const row = codes + r * a.code_stride;
      Register code;
      if constexpr (Products::kWide) code = load_wide_plane<kWeightBits, kPlane, kHalf>(row);
      else code = load_plane<kWeightBits, kWhole>(row, kPlane);
      if constexpr (kBlocks == 1) asm("" : "+x"(code));  // g++ would load it again for each product
      for (int c = 0; c < kChannels; ++c) {
        sums[r][c] = Products::add(sums[r][c], code, w[c]);
        // Else g++ adds the products of both halves first, which takes registers that one row alone leaves.
        if constexpr (Products::kWide && kRows > 1) sums[r][c] = in_register(sums[r][c]);
      }
    }
  });
}

// Weights to prefetch while a tile is multiplied: of some rows, at each block a line or a part of one. The hardware
// would not find the next rows, and asked for all at once they would keep codes waiting.
struct Ahead {
  const uint8_t* from;
  int64_t rows, block_bytes;
};

template <int kChannels>
CG_HD void prefetch(const Ahead& ahead, int64_t stride, int64_t block) {
  const uint8_t* const from = ahead.from + block * ahead.block_bytes;
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    constexpr int kToL2 = 2;
    __builtin_prefetch(from + i * stride, 0, kToL2);
  };
  if (ahead.rows == kChannels) {
#pragma GCC unroll 8
    for (int i = 0; i < kChannels; ++i) row(i);
  } else {
    for (int64_t i = 0; i < ahead.rows; ++i) row(i);
  }
}

// at_once: the blocks whose products are added up before they are widened, if Products do that.
template <class Products, int kWeightBits, int kRows, int kChannels>
__attribute__((noinline)) void dot_tile(const DotPanel& a, int64_t at_once, const uint8_t* codes,
                                        const uint8_t* weights, const Ahead& ahead, int32_t* acc) {
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  const int64_t blocks = a.blocks / kBlocks * kBlocks;
  Register sums[kRows][kChannels];
  for (auto& row : sums) std::fill(row, row + kChannels, Register{});  // "= {}" would be a slow rep stos
  const auto run = [&]<bool kWhole>(int64_t block, int64_t end) __attribute__((always_inline)) {
    const auto add_to = [&](auto& to) __attribute__((always_inline)) {
      for (; block < end; block += kBlocks) {
        prefetch<kChannels>(ahead, a.weight_stride, block);
        add_products<Products, kWeightBits, kWhole>(a, codes + block * kCodes, weights + block * kWeightBlock, to);
      }
    };
    if constexpr (Products::kNarrow) {
      Register narrow[kRows][kChannels] = {};
      add_to(narrow);
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kChannels; ++c) sums[r][c] = Products::widen(sums[r][c], narrow[r][c]);
      }
    } else {
      add_to(sums);
    }
  };
  for (int64_t block = 0; block < blocks; block += at_once) {
    run.template operator()<true>(block, std::min(block + at_once, blocks));
  }
  if constexpr (kBlocks > 1) {
    if (blocks < a.blocks) run.template operator()<false>(blocks, a.blocks);
  }
  int32_t each[kRows * kChannels];
  sum_int32(sums[0], kRows * kChannels, each);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kChannels; ++c) {
      acc[r * a.acc_stride + c] += each[r * kChannels + c] >> kWeightShift<kWeightBits>;
    }
  }
}

// The part of the `next` rows of weights that tile `tile` of `tiles` prefetches.
CG_HD Ahead part_ahead(const DotPanel& a, const uint8_t* weights, int64_t next, int64_t tile, int64_t tiles) {
  const int64_t sharing = std::max<int64_t>(1, tiles / std::max<int64_t>(1, next)), rows = (next + tiles - 1) / tiles;
  const int64_t first = tile / sharing * rows, block_bytes = kWeightBlock / sharing;
  return {weights + first * a.weight_stride + tile % sharing * a.blocks * block_bytes,
          std::clamp<int64_t>(next - first, 0, rows), block_bytes};
}

// Rows [row, a.rows) times kChannels channels. In the time of one tile alone the next weights would not arrive: then
// those after them are prefetched.
template <class Products, int kWeightBits, int kChannels, int kRows>
CG_HD void dot_rows(const DotPanel& a, int64_t at_once, int64_t channel, int64_t row = 0) {
  const uint8_t* const weights = a.weights + channel * a.weight_stride;
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, distance = tiles == 1 ? 2 * kChannels : kChannels;
  const int64_t next = std::clamp<int64_t>(a.channels - channel - distance, 0, kChannels);
  for (; row + kRows <= a.rows; row += kRows) {
    dot_tile<Products, kWeightBits, kRows, kChannels>(
        a, at_once, a.codes + row * a.code_stride, weights,
        part_ahead(a, weights + distance * a.weight_stride, next, row / kTileRows, tiles),
        a.acc + row * a.acc_stride + channel);
  }
  if constexpr (kRows > 1) {
    if (row < a.rows) dot_rows<Products, kWeightBits, kChannels, kRows / 2>(a, at_once, channel, row);
  }
}

// Few rows leave registers for more channels.
template <class Products, int kWeightBits>
void dot_panel_by(const DotPanel& a) {
  const int64_t at_once = Products::blocks_at_once(kPlanes<kWeightBits>, a.bits, a.blocks);
  int64_t channel = 0;
  if (a.rows < kTileRows) {
    constexpr int kMany = 2 * kTileChannels;
    for (; channel + kMany <= a.channels; channel += kMany) {
      dot_rows<Products, kWeightBits, kMany, kTileRows / 2>(a, at_once, channel);
    }
  }
  for (; channel + kTileChannels <= a.channels; channel += kTileChannels) {
    dot_rows<Products, kWeightBits, kTileChannels, kTileRows>(a, at_once, channel);
  }
  for (; channel < a.channels; ++channel) dot_rows<Products, kWeightBits, 1, kTileRows>(a, at_once, channel);
}

}  // namespace
}  // namespace cg::CG_ISA
