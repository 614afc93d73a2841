// Packed layout: element i of width w in {1, 2, 4, 8} bits sits in byte i*w / 8 at shift (i*w) % 8, little-endian; the
// last byte is padded with zeros. Saved masks and codes are stored so.
#pragma once

#include "macros.h"

namespace cg {

// The bits saved for backward: x > 0; 0 < x <= L[q]; two bits, 0 / inside / above; or -alpha/2 <= x <= L[q] + alpha/2.
enum class MaskKind { nothing, positive, inside, state, near };

CG_HD int mask_width(MaskKind kind) { return kind == MaskKind::nothing ? 0 : kind == MaskKind::state ? 2 : 1; }

// Bits a code is stored in: 3 bits take 4, and 5 to 7 take 8.
constexpr CG_HD int packed_width(int bits) { return bits <= 2 ? bits : bits <= 4 ? 4 : 8; }

// For any integer type of counts (symbolic sizes too).
template <class Int>
Int packed_bytes(Int count, int width) {
  return (count * width + 7) / 8;
}

// Joins the low kWidth bits of each of 8 bytes into the low 8 * kWidth bits; and back.
template <int kWidth>
struct ByteFields {
  static constexpr uint64_t kOne = 0x0101010101010101u * ((1u << kWidth) - 1);
  static constexpr uint64_t kTwo = 0x0001000100010001u * ((1u << 2 * kWidth) - 1);
  static constexpr uint64_t kFour = 0x0000000100000001u * ((uint64_t{1} << 4 * kWidth) - 1);
  static constexpr uint64_t kEight = (uint64_t{1} << 8 * kWidth) - 1;

  static CG_HD uint64_t gather(uint64_t v) {
    v = (v | (v >> (8 - kWidth))) & kTwo;
    v = (v | (v >> (16 - 2 * kWidth))) & kFour;
    return (v | (v >> (32 - 4 * kWidth))) & kEight;
  }
  static CG_HD uint64_t scatter(uint64_t v) {
    v = (v | (v << (32 - 4 * kWidth))) & kFour;
    v = (v | (v << (16 - 2 * kWidth))) & kTwo;
    return (v | (v << (8 - kWidth))) & kOne;
  }
};
template <>
struct ByteFields<8> {
  static CG_HD uint64_t gather(uint64_t v) { return v; }
  static CG_HD uint64_t scatter(uint64_t v) { return v; }
};

// Spreads the 32 low bits to every second place; and back.
CG_HD uint64_t spread_bits(uint64_t v) {
  v &= 0xffffffffu;
  v = (v | (v << 16)) & 0x0000ffff0000ffffu;
  v = (v | (v << 8)) & 0x00ff00ff00ff00ffu;
  v = (v | (v << 4)) & 0x0f0f0f0f0f0f0f0fu;
  v = (v | (v << 2)) & 0x3333333333333333u;
  return (v | (v << 1)) & 0x5555555555555555u;
}
CG_HD uint64_t unspread_bits(uint64_t v) {
  v &= 0x5555555555555555u;
  v = (v | (v >> 1)) & 0x3333333333333333u;
  v = (v | (v >> 2)) & 0x0f0f0f0f0f0f0f0fu;
  v = (v | (v >> 4)) & 0x00ff00ff00ff00ffu;
  v = (v | (v >> 8)) & 0x0000ffff0000ffffu;
  return (v | (v >> 16)) & 0xffffffffu;
}

// The 2-bit states of 64 elements from the bits of those inside and those above.
CG_HD void bitpack_states(uint64_t inside, uint64_t above, uint64_t (&words)[2]) {
  words[0] = spread_bits(inside) | spread_bits(above) << 1;
  words[1] = spread_bits(inside >> 32) | spread_bits(above >> 32) << 1;
}

}  // namespace cg
