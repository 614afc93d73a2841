// The bits and the 2-bit states of a block as words, for the instruction sets whose masks are words or bools.
#pragma once

#include "../../math/bits.h"

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

}  // namespace cg::CG_ISA
