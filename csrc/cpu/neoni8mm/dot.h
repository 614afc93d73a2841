// Products of rows of codes and weights by USMMLA, which adds eight products to each of the four sums of two rows and
// two channels. Codes of two rows are brought side by side once for all channels.
#pragma once

#include <algorithm>

#define CG_DOT_UNSIGNED
#include "../neon/depthwise.h"
#include "../neon/dot_rows.h"
#include "dot_columns.h"

namespace cg::neon {
namespace {

// Of rows and of channels: sums take 16 of 32 registers.
constexpr int kTilePairs = 4;

// Those of a panel, and of one more row if it has an odd number.
constexpr int64_t kMaxPairedCodes = kPanelBytes + kPanelBytes / kMinPanelRows + kMaxPanelRows * 8 * kWeightBlock;

// Eight codes of a row, then eight of the next, or zeros; of the rows [row, row + 2) of each pair in turn.
void pair_codes(const DotPanel& a, int64_t row, int64_t rows, int64_t count, uint8_t* to) {
  for (; rows > 0; row += 2, rows -= 2, to += 2 * count) {
    const uint8_t *const first = a.codes + row * a.code_stride, *const second = first + a.code_stride;
    for (int64_t i = 0; i < count; i += 16) {
      const uint64x2_t one = vreinterpretq_u64_u8(load<uint8x16_t>(first + i));
      const uint64x2_t other = rows > 1 ? vreinterpretq_u64_u8(load<uint8x16_t>(second + i)) : vdupq_n_u64(0);
      vst1q_u8(to + 2 * i, vreinterpretq_u8_u64(vzip1q_u64(one, other)));
      vst1q_u8(to + 2 * i + 16, vreinterpretq_u8_u64(vzip2q_u64(one, other)));
    }
  }
}

// Sums of pairs of rows and channels, the last of which may be one. Rows of acc go on behind an odd last channel.
template <int kWeightBits, int kRowPairs, int kChannelPairs>
__attribute__((noinline)) void dot_pairs(const DotPanel& a, const uint8_t* codes, int64_t rows, int64_t channels,
                                         const uint8_t* weights, int32_t* acc) {
  constexpr int kCount = kPlanes<kWeightBits>;
  const int64_t pair_bytes = 2 * a.blocks * kWeightBlock * kCount;
  const int64_t last = std::min<int64_t>(2 * kChannelPairs, channels) - 1;
  int32x4_t sums[kRowPairs][kChannelPairs];
  for (int r = 0; r < kRowPairs; ++r) {
    for (int c = 0; c < kChannelPairs; ++c) sums[r][c] = vdupq_n_s32(0);
  }
  // Half a block at a time: its codes of a plane are as far apart as whole blocks are.
  for (int64_t at = 0; at < a.blocks * kWeightBlock; at += 16) {
    const uint8_t* const from = codes + 2 * (at / kWeightBlock * kWeightBlock * kCount + at % kWeightBlock);
    uint8x16_t packed[2][kChannelPairs];
    for (int c = 0; c < kChannelPairs; ++c) {
      const int64_t one = 2 * c, other = std::min<int64_t>(2 * c + 1, last);
      const uint64x2_t w = vreinterpretq_u64_u8(load<uint8x16_t>(weights + one * a.weight_stride + at));
      const uint64x2_t v = vreinterpretq_u64_u8(load<uint8x16_t>(weights + other * a.weight_stride + at));
      packed[0][c] = vreinterpretq_u8_u64(vzip1q_u64(w, v)), packed[1][c] = vreinterpretq_u8_u64(vzip2q_u64(w, v));
    }
    const auto add_plane = [&]<int kPlane>(std::integral_constant<int, kPlane>) __attribute__((always_inline)) {
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const code = from + 2 * kPlane * kWeightBlock + 16 * half;
        uint8x16_t v[kRowPairs];
        for (int r = 0; r < kRowPairs; ++r) v[r] = load<uint8x16_t>(code + r * pair_bytes);
        for (int c = 0; c < kChannelPairs; ++c) {
          const int8x16_t w = unpack_weights<kWeightBits, kPlane>(packed[half][c]);
          for (int r = 0; r < kRowPairs; ++r) sums[r][c] = vusmmlaq_s32(sums[r][c], v[r], w);
        }
      }
    };
    for_each_plane<kCount>(add_plane);
  }
  for (int64_t r = 0; r < kRowPairs; ++r) {
    for (int c = 0; c < kChannelPairs; ++c) {
      int32_t* const to = acc + 2 * r * a.acc_stride + 2 * c;
      const int32x4_t sum = sums[r][c] >> kWeightShift<kWeightBits>;
      vst1_s32(to, vld1_s32(to) + vget_low_s32(sum));
      if (2 * r + 1 == rows) continue;
      vst1_s32(to + a.acc_stride, vld1_s32(to + a.acc_stride) + vget_high_s32(sum));
    }
  }
}

template <int kWeightBits, int kChannelPairs, int kRowPairs = kTilePairs>
void dot_row_pairs(const DotPanel& a, const uint8_t* codes, int64_t rows, int64_t channel, int32_t* acc) {
  const int64_t pair_bytes = 2 * a.blocks * kWeightBlock * kPlanes<kWeightBits>;
  while (rows > 2 * (kRowPairs - 1)) {
    dot_pairs<kWeightBits, kRowPairs, kChannelPairs>(a, codes, rows, a.channels - channel,
                                                     a.weights + channel * a.weight_stride, acc + channel);
    codes += kRowPairs * pair_bytes, acc += 2 * kRowPairs * a.acc_stride, rows -= 2 * kRowPairs;
  }
  if constexpr (kRowPairs > 1) {
    if (rows > 0) dot_row_pairs<kWeightBits, kChannelPairs, kRowPairs / 2>(a, codes, rows, channel, acc);
  }
}

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  if (a.rows == 1) return dot_channels<kWeightBits, false, 1, kChannelsOfOneRow>(a);
  alignas(64) uint8_t paired[kMaxPairedCodes];
  const int64_t count = a.blocks * kWeightBlock * kPlanes<kWeightBits>;
  for (int64_t row = 0; row < a.rows; row += kMaxPanelRows) {
    const int64_t rows = std::min(a.rows - row, kMaxPanelRows);
    int32_t* const acc = a.acc + row * a.acc_stride;
    pair_codes(a, row, rows, count, paired);
    int64_t channel = 0;
    for (; channel + 2 * kTilePairs <= a.channels; channel += 2 * kTilePairs) {
      dot_row_pairs<kWeightBits, kTilePairs>(a, paired, rows, channel, acc);
    }
    for (; channel < a.channels; channel += 2) dot_row_pairs<kWeightBits, 1>(a, paired, rows, channel, acc);
  }
}

}  // namespace
}  // namespace cg::neon
