// The 2-bit states of a block as two words, for the instruction sets whose masks are words or bools.
#pragma once

#include "../../math/bits.h"

namespace cg {

struct WordStates {
  uint64_t low, high;

  template <class Unspread>
  CG_HD WordStates(const uint8_t* packed, const Unspread& unspread) {
    uint64_t words[2];
    memcpy(words, packed, sizeof(words));
    low = unspread(words[0]) | unspread(words[1]) << 32;
    high = unspread(words[0] >> 1) | unspread(words[1] >> 1) << 32;
  }
  CG_HD uint64_t inside() const { return low; }
  CG_HD uint64_t above() const { return high; }
  CG_HD uint64_t either() const { return low | high; }
};

}  // namespace cg
