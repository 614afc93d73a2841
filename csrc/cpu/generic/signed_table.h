// What an instruction set may have in place of arithmetic: the signed staircase of up to 4 bits of one alpha, looked up
// in registers.
#pragma once

#include "instruction_set.h"

namespace cg::CG_ISA {

// SignedTable<T>(alpha, p).store<kCodes>(x, y, codes, bits, stream) of a block: of a group, so that no x is NaN or
// above p alpha.
template <class T>
struct SignedTable {
  static constexpr bool kServed = false;
};

}  // namespace cg::CG_ISA
