// 512-bit registers of bytes.
#pragma once

#include <immintrin.h>

#include "../../math/macros.h"

#define CG_ISA avx512
#define CG_MM(name) _mm512_##name

namespace cg::avx512 {

using Register = __m512i;
using HalfRegister = __m256i;
CG_HD Register load_register(const void* p) { return _mm512_loadu_si512(p); }
CG_HD void store_register(void* p, Register v) { _mm512_storeu_si512(p, v); }
CG_HD HalfRegister load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
CG_HD HalfRegister low_half(Register v) { return _mm512_castsi512_si256(v); }
CG_HD HalfRegister high_half(Register v) { return _mm512_extracti64x4_epi64(v, 1); }
CG_HD Register join_halves(HalfRegister low, HalfRegister high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
CG_HD Register load_lower_half(const void* p) { return _mm512_zextsi256_si512(load_half(p)); }
// The sum of the 32-bit lanes of each register.
CG_HD void sum_int32(const Register* v, int count, int32_t* sums) {
  for (int i = 0; i < count; ++i) sums[i] = _mm512_reduce_add_epi32(v[i]);
}

}  // namespace cg::avx512
