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

namespace {

// A row of weights, one in a byte.
void unpack_row(const uint8_t* packed, int64_t bytes, int bits, uint8_t* to) {
  const __m256i field = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
  const __m256i top = _mm256_set1_epi8(static_cast<char>(1 << (bits - 1)));
  for (int64_t at = 0; at < bytes; at += kWeightBlock) {
    const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed + at));
    for (int up = 0; up < 8; up += bits, to += kWeightBlock) {
      __m256i w = _mm256_srl_epi16(block, _mm_cvtsi32_si128(up)) & field;
      w = bits == 1 ? _mm256_sub_epi8(_mm256_add_epi8(w, w), top) : _mm256_sub_epi8(w ^ top, top);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), w);
    }
  }
}

}  // namespace
}  // namespace cg::CG_ISA
