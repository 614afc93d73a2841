// 256-bit registers of bytes.
#pragma once

#include <immintrin.h>

#include "../../math/macros.h"

#define CG_ISA avx2
#define CG_MM(name) _mm256_##name

namespace cg::avx2 {

using Register = __m256i;
using HalfRegister = __m128i;
CG_HD Register load_register(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
CG_HD void store_register(void* p, Register v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
CG_HD HalfRegister load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
CG_HD void store_half(void* p, HalfRegister v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
CG_HD HalfRegister low_half(Register v) { return _mm256_castsi256_si128(v); }
CG_HD HalfRegister high_half(Register v) { return _mm256_extracti128_si256(v, 1); }
CG_HD Register join_halves(HalfRegister low, HalfRegister high) { return _mm256_setr_m128i(low, high); }
CG_HD Register load_lower_half(const void* p) { return _mm256_zextsi128_si256(load_half(p)); }
// The sum of the 32-bit lanes of each register.
CG_HD void sum_int32(const Register* v, int count, int32_t* sums) {
  int i = 0;
  for (; i + 4 <= count; i += 4, v += 4) {
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    store_half(sums + i, _mm_add_epi32(low_half(halves), high_half(halves)));
  }
  for (; i < count; ++i, ++v) {
    const __m128i four = _mm_add_epi32(low_half(*v), high_half(*v)), two = _mm_hadd_epi32(four, four);
    sums[i] = _mm_cvtsi128_si32(_mm_hadd_epi32(two, two));
  }
}

}  // namespace cg::avx2
