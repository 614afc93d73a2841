// What an instruction set may have in place of a load of codes, a product and a rounding: the levels of one alpha, 64
// at a time, from packed codes of kWidth bits.
#pragma once

#include "instruction_set.h"

namespace cg::CG_ISA {

// LevelTable<T, kWidth>(the level of each code, alpha).store(packed, y, stream)
template <class T, int kWidth>
struct LevelTable {
  static constexpr bool kServed = false;
};

}  // namespace cg::CG_ISA
