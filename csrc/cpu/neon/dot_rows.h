// Products of rows of codes and weights along the rows: a register of weights is unpacked once for each tile of rows.
// CG_DOT_FOURS: by SDOT, which adds four products of bytes to a 32-bit number. CG_DOT_UNSIGNED: by USDOT, for which
// codes are unsigned.
#pragma once

#include <utility>

#include "unpack_weights.h"

namespace cg::neon {
namespace {

// Sums are kept in registers, of which there are 32.
constexpr int kTileRows = 4, kTileChannels = 4, kChannelsOfOneRow = 8;

#if defined(CG_DOT_UNSIGNED)
constexpr int kCodeBits = 8;
CG_HD int32x4_t add_products(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
  return vusdotq_s32(sums, codes, weights);
}
#else
constexpr int kCodeBits = 7;  // that signed numbers have
CG_HD int32x4_t add_products(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
  const int8x16_t v = vreinterpretq_s8_u8(codes);
#if defined(CG_DOT_FOURS)
  return vdotq_s32(sums, v, weights);
#else
  // No two products of one sign, the largest, leave 16 bits.
  const int16x8_t low = vmull_s8(vget_low_s8(v), vget_low_s8(weights));
  return vpadalq_s16(vpadalq_s16(sums, low), vmull_high_s8(v, weights));
#endif
}
#endif

// body(integral_constant) of each plane of a block.
template <int kCount, class Body>
CG_HD void for_each_plane(const Body& body) {
  [&]<int... kPlane>(std::integer_sequence<int, kPlane...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, kPlane>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Shifted: codes of more than kCodeBits are multiplied as signed numbers, less by 128, and their weights are summed for
// it.
template <int kWeightBits, bool kShifted, int kRows, int kChannels>
__attribute__((noinline)) void dot_tile(const DotPanel& a, const uint8_t* codes, const uint8_t* weights, int32_t* acc) {
  constexpr int kCount = kPlanes<kWeightBits>;
  int32x4_t sums[kRows][kChannels], weight_sums[kChannels];
  for (int c = 0; c < kChannels; ++c) {
    weight_sums[c] = vdupq_n_s32(0);
    for (int r = 0; r < kRows; ++r) sums[r][c] = weight_sums[c];
  }
  const auto add = [&](const uint8_t* from, int64_t at) __attribute__((always_inline)) {
    uint8x16_t packed[kChannels];
    for (int c = 0; c < kChannels; ++c) packed[c] = load<uint8x16_t>(weights + c * a.weight_stride + at);
    for_each_plane<kCount>([&]<int kPlane>(std::integral_constant<int, kPlane>) __attribute__((always_inline)) {
      int8x16_t w[kChannels];
      for (int c = 0; c < kChannels; ++c) {
        w[c] = unpack_weights<kWeightBits, kPlane>(packed[c]);
        if constexpr (kShifted) weight_sums[c] = add_products(weight_sums[c], vdupq_n_u8(1), w[c]);
      }
      for (int r = 0; r < kRows; ++r) {
        uint8x16_t code = load<uint8x16_t>(from + r * a.code_stride + kPlane * kWeightBlock);
        if constexpr (kShifted) code ^= uint8_t{0x80};
        for (int c = 0; c < kChannels; ++c) sums[r][c] = add_products(sums[r][c], code, w[c]);
      }
    });
  };
  // Half a block at a time: its codes of a plane are as far apart as whole blocks are.
  for (int64_t at = 0; at < a.blocks * kWeightBlock;) {
    if constexpr (kCount == 1) {
      add(codes + at, at);
      at += 16;
    } else {
      add(codes + at * kCount, at);
      add(codes + at * kCount + 16, at + 16);
      at += kWeightBlock;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kChannels; ++c) {
      int32_t sum = vaddvq_s32(sums[r][c]);
      if constexpr (kShifted) sum += 128 * vaddvq_s32(weight_sums[c]);
      acc[r * a.acc_stride + c] += sum >> kWeightShift<kWeightBits>;
    }
  }
}

template <int kWeightBits, bool kShifted, int kRows, int kChannels>
void dot_rows(const DotPanel& a, int64_t channel, int64_t row = 0) {
  for (; row + kRows <= a.rows; row += kRows) {
    dot_tile<kWeightBits, kShifted, kRows, kChannels>(
        a, a.codes + row * a.code_stride, a.weights + channel * a.weight_stride, a.acc + row * a.acc_stride + channel);
  }
  if constexpr (kRows > 1) {
    if (row < a.rows) dot_rows<kWeightBits, kShifted, kRows / 2, kChannels>(a, channel, row);
  }
}

template <int kWeightBits, bool kShifted, int kRows, int kChannels>
void dot_channels(const DotPanel& a) {
  int64_t channel = 0;
  for (; channel + kChannels <= a.channels; channel += kChannels) {
    dot_rows<kWeightBits, kShifted, kRows, kChannels>(a, channel);
  }
  for (; channel < a.channels; ++channel) dot_rows<kWeightBits, kShifted, kRows, 1>(a, channel);
}

template <int kWeightBits>
void dot_panel_by_rows(const DotPanel& a) {
  const auto run = [&](auto shifted) {
    if (a.rows == 1) dot_channels<kWeightBits, shifted.value, 1, kChannelsOfOneRow>(a);
    else dot_channels<kWeightBits, shifted.value, kTileRows, kTileChannels>(a);
  };
  if constexpr (kCodeBits < 8) {
    if (a.bits == 8) return run(std::true_type{});
  }
  run(std::false_type{});
}

}  // namespace
}  // namespace cg::neon
