// The search for the scale of weights: codes of 16 bits, a register at a time.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/registers.h"
#endif

namespace cg::CG_ISA {

// (sum of products with codes, sum of squared codes) of `count` short magnitudes, whole registers, whose sums fit into
// 32 bits. A code is `search_code` (math/weights.h) for a top of kTop and a shift of kShift + 15.
template <int kTop, int kShift>
CG_HD void search_codes(const int16_t* m, int count, int32_t inverse, int32_t (&sums)[2]) {
  const Register factor = CG_MM(set1_epi16)(static_cast<short>(inverse));
  const Register most = CG_MM(set1_epi16)(kTop << kShift), half = CG_MM(set1_epi16)(1 << (kShift - 1));
  Register products[2] = {};
  for (int i = 0; i < count; i += static_cast<int>(sizeof(Register) / sizeof(int16_t))) {
    const Register numbers = load_register(m + i);
    const Register fine = CG_MM(mulhi_epu16)(CG_MM(add_epi16)(numbers, numbers), factor);
    const Register codes = CG_MM(srli_epi16)(CG_MM(add_epi16)(CG_MM(min_epu16)(fine, most), half), kShift);
    products[0] = CG_MM(add_epi32)(products[0], CG_MM(madd_epi16)(codes, numbers));
    products[1] = CG_MM(add_epi32)(products[1], CG_MM(madd_epi16)(codes, codes));
  }
  sum_int32(products, 2, sums);
}

}  // namespace cg::CG_ISA
