// Packed weights as signed bytes, in a register of either width.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/bytes.h"
#endif
#include "../generic/dot_panel.h"

namespace cg::CG_ISA {

// Fields are left in the upper bits of a byte, which costs least and has the right sign: weights are multiplied by
// 1 << kWeightShift.
template <int kWeightBits>
constexpr int kWeightShift = kWeightBits == 1 ? 6 : 8 - kWeightBits;

template <int kWeightBits, int kPlane>
CG_HD Register unpack_weights(Register packed) {
  if constexpr (kWeightBits == 8) return packed;
  constexpr int kUp = 8 - kWeightBits * (kPlane + 1);
  if constexpr (kUp > 0) packed = CG_MM(slli_epi16)(packed, kUp);
  packed &= CG_MM(set1_epi8)(static_cast<char>(0xff << (8 - kWeightBits)));
  if constexpr (kWeightBits == 1) packed ^= CG_MM(set1_epi8)(static_cast<char>(0xc0));  // 0 to -64, 1 to 64
  return packed;
}

}  // namespace cg::CG_ISA
