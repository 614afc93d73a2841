// 16 floats or 8 doubles in a register.
#pragma once

#include "registers.h"

#include "../x86/vec.h"

namespace cg::avx512 {

// Newton's step squares the error, which is 2^-14 or less.
CG_HD Floats approximate_reciprocal(Floats d) {
  const __m512 guess = _mm512_rcp14_ps(d.v), error = _mm512_fnmadd_ps(d.v, guess, _mm512_set1_ps(1));
  return _mm512_fmadd_ps(guess, error, guess);
}

template <>
struct Lanes<Floats> {
  static constexpr int kCount = 16;
  static CG_HD uint64_t bits(LaneMask<float> m) { return m.m; }
  static CG_HD LaneMask<float> mask(uint64_t bits) { return {static_cast<__mmask16>(bits)}; }
  static CG_HD void store_codes(uint8_t* p, Floats code) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code.v)));
  }
  static CG_HD Floats load_codes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  template <int kDistance>
  static CG_HD Floats exchange(Floats v) {
    if constexpr (kDistance >= 4) return _mm512_shuffle_f32x4(v.v, v.v, kDistance == 4 ? 0xb1 : 0x4e);
    else return _mm512_permute_ps(v.v, kDistance == 1 ? 0xb1 : 0x4e);
  }
  static CG_HD float sum(Floats v) { return _mm512_reduce_add_ps(v.v); }
};

template <>
struct Lanes<Doubles> {
  static constexpr int kCount = 8;
  static CG_HD uint64_t bits(LaneMask<double> m) { return m.m; }
  static CG_HD LaneMask<double> mask(uint64_t bits) { return {static_cast<__mmask8>(bits)}; }
  static CG_HD void store_codes(uint8_t* p, Doubles code) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(_mm512_cvtpd_epi64(code.v)));
  }
  static CG_HD Doubles load_codes(const uint8_t* p) {
    return _mm512_cvtepi64_pd(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  template <int kDistance>
  static CG_HD Doubles exchange(Doubles v) {
    if constexpr (kDistance >= 2) return _mm512_shuffle_f64x2(v.v, v.v, kDistance == 2 ? 0xb1 : 0x4e);
    else return _mm512_permute_pd(v.v, 0x55);
  }
  static CG_HD double sum(Doubles v) { return _mm512_reduce_add_pd(v.v); }
};

constexpr int kPrefetchBytes = 0, kChains = 1;

}  // namespace cg::avx512
