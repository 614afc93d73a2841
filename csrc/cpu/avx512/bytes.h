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
CG_HD Register broadcast_int64(int64_t v) { return _mm512_set1_epi64(v); }
// The sum of the 32-bit lanes of each register.
CG_HD void sum_int32(const Register* v, int count, int32_t* sums) {
  const auto add = [](Register a, Register b) { return _mm512_add_epi32(a, b); };
  const int fours = count / 4 * 4;
  for (int i = 0; i < fours; i += 16) {  // up to 16 at a time: each step adds pairs of lanes
    Register four[4] = {};
    for (int j = 0; j < 4 && i + 4 * j < fours; ++j) {
      Register two[2];
      for (int k = 0; k < 2; ++k) {
        const Register a = v[i + 4 * j + 2 * k], b = v[i + 4 * j + 2 * k + 1];
        two[k] = add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
      }
      four[j] = add(_mm512_unpacklo_epi64(two[0], two[1]), _mm512_unpackhi_epi64(two[0], two[1]));
    }
    const auto halves = [&](Register a, Register b) {
      return add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    const Register all = halves(halves(four[0], four[1]), halves(four[2], four[3]));
    memcpy(sums + i, &all, (fours - i < 16 ? fours - i : 16) * sizeof(int32_t));
  }
  for (int i = fours; i < count; ++i) sums[i] = _mm512_reduce_add_epi32(v[i]);
}
// The sums of each two 32-bit lanes of a, then of b.
CG_HD Register add_neighbors(Register a, Register b) {
  const Register even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Register odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b));
}
// A 16 x 16 matrix of 32-bit numbers, transposed.
CG_HD void transpose(Register (&v)[16]) {
  Register t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // v[4 i + j] now has column 4 k + j of rows 4 i ... 4 i + 3 in its k-th quarter.
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
    t[j + 8] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
    t[j + 12] = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    v[j + 4] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    v[j + 12] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd);
  }
}

}  // namespace cg::avx512
