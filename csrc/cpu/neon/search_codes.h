// The search for the scale of weights: codes of 16 bits, a register at a time.
#pragma once

#include "registers.h"

namespace cg::neon {

// (sum of products with codes, sum of squared codes) of `count` short magnitudes, whole registers, whose sums fit into
// 32 bits. A code is `search_code` (math/weights.h) for a top of kTop and a shift of kShift + 15.
template <int kTop, int kShift>
CG_HD void search_codes(const int16_t* m, int count, int32_t inverse, int32_t (&sums)[2]) {
  const uint16x8_t factor = vdupq_n_u16(static_cast<uint16_t>(inverse));
  const uint16x8_t most = vdupq_n_u16(kTop << kShift);
  uint32x4_t product = vdupq_n_u32(0), square = product;
  const auto add = [](uint32x4_t to, uint16x8_t a, uint16x8_t b) {
    return vmlal_high_u16(vmlal_u16(to, vget_low_u16(a), vget_low_u16(b)), a, b);
  };
  for (int i = 0; i < count; i += 8) {
    const uint16x8_t numbers = load<uint16x8_t>(m + i), twice = numbers + numbers;
    const uint32x4_t low = vmull_u16(vget_low_u16(twice), vget_low_u16(factor)), high = vmull_high_u16(twice, factor);
    const uint16x8_t fine = vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
    const uint16x8_t codes = vrshrq_n_u16(vminq_u16(fine, most), kShift);
    product = add(product, codes, numbers);
    square = add(square, codes, codes);
  }
  sums[0] = static_cast<int32_t>(vaddvq_u32(product)), sums[1] = static_cast<int32_t>(vaddvq_u32(square));
}

}  // namespace cg::neon
