// The rules for the gradient of alpha: dalpha = scale * sum(dy * A). A is 0 for x <= 0 and q above the top level; the
// rules differ inside. `exact` is the code itself everywhere, `chain` is c - u g'(u) everywhere.
#pragma once

#include "ste.h"

namespace cg {

#define CG_FOR_EACH_ALPHA_GRAD(X) \
  X(exact)                        \
  X(three_valued)                 \
  X(two_valued)                   \
  X(chain)

enum class AlphaGrad {
#define CG_NAME(name) name,
  CG_FOR_EACH_ALPHA_GRAD(CG_NAME)
#undef CG_NAME
};

// A inside 0 < x <= L[q], for the two rules that need only the 2-bit state.
template <class A>
CG_HD A inside_value(AlphaGrad rule, A q) {
  return rule == AlphaGrad::three_valued ? (q + A(1)) / A(2) : A(0);
}

// A under `chain`.
template <class F>
CG_HD F chain_value(const Point<F>& p, F code, F slope) {
  return code - times_slope(p.u, slope);
}

}  // namespace cg
