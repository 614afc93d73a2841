// Packed weights as signed bytes.
#pragma once

#include "../generic/dot_panel.h"
#include "registers.h"

namespace cg::neon {
namespace {

// Fields of two bits and more are left in the upper bits of a byte, which costs least and has the right sign: weights
// are multiplied by 1 << kWeightShift.
template <int kWeightBits>
constexpr int kWeightShift = kWeightBits == 1 ? 0 : 8 - kWeightBits;

template <int kWeightBits, int kPlane>
CG_HD int8x16_t unpack_weights(uint8x16_t packed) {
  if constexpr (kWeightBits == 8) {
    return vreinterpretq_s8_u8(packed);
  } else if constexpr (kWeightBits == 1) {
    const uint8x16_t set = vtstq_u8(packed, vdupq_n_u8(1 << kPlane));
    return vreinterpretq_s8_u8(vornq_u8(vdupq_n_u8(1), set));  // -1 or 1
  } else {
    constexpr int kUp = 8 - kWeightBits * (kPlane + 1);
    if constexpr (kUp > 0) packed = vshlq_n_u8(packed, kUp);
    if constexpr (kPlane > 0) packed &= static_cast<uint8_t>(0xff << (8 - kWeightBits));
    return vreinterpretq_s8_u8(packed);
  }
}

void unpack_row(const uint8_t* packed, int64_t bytes, int bits, uint8_t* to) {
  const uint8x16_t field = vdupq_n_u8(static_cast<uint8_t>((1 << bits) - 1));
  const uint8x16_t top = vdupq_n_u8(static_cast<uint8_t>(1 << (bits - 1)));
  for (int64_t at = 0; at < bytes; at += kWeightBlock) {
    for (int up = 0; up < 8; up += bits, to += kWeightBlock) {
      for (int64_t half = 0; half < kWeightBlock; half += 16) {
        const uint8x16_t block = load<uint8x16_t>(packed + at + half);
        const uint8x16_t w = vshlq_u8(block, vdupq_n_s8(static_cast<int8_t>(-up))) & field;
        store(to + half, bits == 1 ? w + w - top : (w ^ top) - top);
      }
    }
  }
}

}  // namespace
}  // namespace cg::neon
