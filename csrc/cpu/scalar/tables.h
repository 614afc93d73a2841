// Tables of numbers, looked up by codes.
#pragma once

#include "bits.h"

namespace cg::scalar {

template <class A>
struct LargeTable {
  const A* entries;
  CG_HD LargeTable(const A* from, int) : entries(from) {}
  CG_HD A at(const uint8_t* codes) const { return entries[*codes]; }
};
template <class A>
struct SmallTable {
  static constexpr int kSize = 0;
};

template <class V>
constexpr bool kAddsWeighed = false;

}  // namespace cg::scalar
