// The saved bits of a block, masks and 2-bit states, as words; codes by words of eight.
#pragma once

#include "../generic/word_masks.h"
#include "vec.h"

namespace cg::scalar {

using BlockBits = uint64_t;
struct BlockStates : WordStates {
  explicit CG_HD BlockStates(const uint8_t* packed) : WordStates(packed, [](uint64_t v) { return unspread_bits(v); }) {}
};

template <int kCount, class U>
CG_HD void masked_copy(const U* from, U* to, uint64_t bits, int first, bool) {
  for (int i = first; i < first + kCount; ++i) to[i] = (bits >> i) & 1 ? from[i] : U(0);
}

template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    memcpy(&eight, codes + 8 * i, 8);
    eight = ByteFields<kWidth>::gather(eight);
    memcpy(packed + kWidth * i, &eight, kWidth);
  }
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight = 0;
    memcpy(&eight, packed + kWidth * i, kWidth);
    eight = ByteFields<kWidth>::scatter(eight);
    memcpy(codes + 8 * i, &eight, 8);
  }
}
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(codes[i] != 0) << i;
  return bits;
}

}  // namespace cg::scalar
