// 128-bit registers of NEON, which every CPU of AArch64 has.
#pragma once

#include <arm_neon.h>

#include "../../math/macros.h"

#define CG_ISA neon

namespace cg::neon {

// Of any type of numbers, as a register may hold what was stored as another.
template <class R>
CG_HD R load(const void* p) {
  R v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class R>
CG_HD void store(void* p, R v) {
  memcpy(p, &v, sizeof(v));
}

// The lanes of two registers in half as many bits each: their low halves.
CG_HD uint16x8_t narrow(uint32x4_t a, uint32x4_t b) {
  return vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
}
CG_HD uint8x16_t narrow(uint16x8_t a, uint16x8_t b) {
  return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
}
// The low halves of the lanes of one, and below them or above those of another.
CG_HD uint16x8_t interleave(uint32x4_t even, uint32x4_t odd) {
  return vreinterpretq_u16_u32(vsliq_n_u32(even, odd, 16));
}

// Bytes of all ones or none to bits: 64, 32 or 16 of them.
CG_HD uint8x16_t places_of(uint8x16_t bytes) {
  const uint8x16_t place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  return vandq_u8(bytes, place);
}
CG_HD uint8x16_t bits_of(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
  const uint8x16_t both = vpaddq_u8(vpaddq_u8(places_of(a), places_of(b)), vpaddq_u8(places_of(c), places_of(d)));
  return vpaddq_u8(both, both);
}
CG_HD uint8x16_t bits_of(uint8x16_t a, uint8x16_t b) {
  const uint8x16_t both = vpaddq_u8(places_of(a), places_of(b)), half = vpaddq_u8(both, both);
  return vpaddq_u8(half, half);
}
CG_HD uint8x16_t bits_of(uint8x16_t a) {
  const uint8x16_t part = vpaddq_u8(places_of(a), places_of(a)), half = vpaddq_u8(part, part);
  return vpaddq_u8(half, half);
}
template <class Word>
CG_HD void store_first(uint8_t* to, uint8x16_t bytes) {
  memcpy(to, &bytes, sizeof(Word));
}
// The bits of kCount registers of masks.
template <size_t kCount>
CG_HD void store_bits_of(uint8_t* to, const uint8x16_t (&m)[kCount]) {
  if constexpr (kCount == 1) {
    store_first<uint16_t>(to, bits_of(m[0]));
  } else if constexpr (kCount == 2) {
    store_first<uint32_t>(to, bits_of(m[0], m[1]));
  } else {
    static_assert(kCount % 4 == 0);
    for (size_t i = 0; i < kCount; i += 4, to += 8) {
      store_first<uint64_t>(to, bits_of(m[i], m[i + 1], m[i + 2], m[i + 3]));
    }
  }
}

}  // namespace cg::neon
