// The search for the scale of weights, one number at a time.
#pragma once

#include "../../math/macros.h"

namespace cg::scalar {

// (sum of products with codes, sum of squared codes) of `count` short magnitudes, whose sums fit into 32 bits. A code
// is `search_code` (math/weights.h) for a top of kTop and a shift of kShift + 15.
template <int kTop, int kShift>
CG_HD void search_codes(const int16_t* m, int count, int32_t inverse, int32_t (&sums)[2]) {
  int32_t product = 0, square = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t code = (m[i] * inverse + (1 << (kShift + 14))) >> (kShift + 15), k = code < kTop ? code : kTop;
    product += m[i] * k, square += k * k;
  }
  sums[0] = product, sums[1] = square;
}

}  // namespace cg::scalar
