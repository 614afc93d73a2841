// What a norm computes of the sums of a row (docs/spec.md, section 8).
#pragma once

#include "macros.h"

namespace cg {

// Element i of a row is added to lane i % kNormLanes, in order from +0; then the upper half of the lanes is added to
// the lower one until one is left.
constexpr int kNormLanes = 1024;

CG_HD float square_root(float a) { return ::sqrtf(a); }
CG_HD double square_root(double a) { return ::sqrt(a); }

// Of the sum of the squares of `count` numbers.
template <class A>
CG_HD A inverse_deviation(A squares, A count, A eps) {
  return A(1) / square_root(squares / count + eps);
}

}  // namespace cg
