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
CG_HD Register broadcast_int64(int64_t v) { return _mm256_set1_epi64x(v); }
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
// The sums of each two 32-bit lanes of a, then of b.
CG_HD Register add_neighbors(Register a, Register b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8); }
// An 8 x 8 matrix of 32-bit numbers, transposed.
CG_HD void transpose(Register (&v)[8]) {
  Register t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  // In its two halves, v[i + j] then has columns j and j + 4 of rows i ... i + 3.
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2x128_si256(v[j], v[j + 4], 0x20);
    t[j + 4] = _mm256_permute2x128_si256(v[j], v[j + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

}  // namespace cg::avx2
