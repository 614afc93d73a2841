// No comparison is faster than that of numbers one at a time.
#pragma once

#include "tables.h"

namespace cg::scalar {

template <class T>
struct CompareKey {
  static constexpr int kSearchBits = 0, kCompareBits = 0;
  static constexpr bool kArithmetic = false;
};

}  // namespace cg::scalar
