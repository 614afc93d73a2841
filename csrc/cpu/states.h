// The bits and the 2-bit states of a block as words, for the instruction sets whose masks are words or bools.
#pragma once

#include "../math/bits.h"

namespace cg::CG_ISA {

using BlockBits = uint64_t;
struct BlockStates {
  uint64_t low, high;
  explicit CG_HD BlockStates(const uint8_t* packed) {
    uint64_t words[2];
    memcpy(words, packed, sizeof(words));
    low = unspread_bits(words[0]) | unspread_bits(words[1]) << 32;
    high = unspread_bits(words[0] >> 1) | unspread_bits(words[1] >> 1) << 32;
  }
  CG_HD uint64_t inside() const { return low; }
  CG_HD uint64_t above() const { return high; }
  CG_HD uint64_t either() const { return low | high; }
};
CG_HD void store_bits(uint8_t* to, uint64_t bits) { memcpy(to, &bits, sizeof(bits)); }
CG_HD void pack_states(uint64_t inside, uint64_t above, uint64_t (&words)[2]) {
  words[0] = spread_bits(inside) | spread_bits(above) << 1;
  words[1] = spread_bits(inside >> 32) | spread_bits(above >> 32) << 1;
}
CG_HD void store_states(uint8_t* to, uint64_t inside, uint64_t above) {
  uint64_t words[2];
  pack_states(inside, above, words);
  memcpy(to, words, sizeof(words));
}

}  // namespace cg::CG_ISA
