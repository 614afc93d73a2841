// 8 floats or 4 doubles in a register.
#pragma once

#include "registers.h"

#include "../x86/vec.h"

namespace cg::avx2 {

// Newton's step squares the error, which is 2^-11 or less, as CPUs differ.
CG_HD Floats approximate_reciprocal(Floats d) {
  const __m256 guess = _mm256_rcp_ps(d.v), error = _mm256_fnmadd_ps(d.v, guess, _mm256_set1_ps(1));
  return _mm256_fmadd_ps(guess, error, guess);
}

template <>
struct Lanes<Floats> {
  static constexpr int kCount = 8;
  static CG_HD uint64_t bits(LaneMask<float> m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }
  static CG_HD LaneMask<float> mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane))};
  }
  static CG_HD void store_codes(uint8_t* p, Floats code) {
    const __m256i c = _mm256_cvtps_epi32(code.v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static CG_HD Floats load_codes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  template <int kDistance>
  static CG_HD Floats exchange(Floats v) {
    if constexpr (kDistance == 4) return _mm256_permute2f128_ps(v.v, v.v, 1);
    else return _mm256_permute_ps(v.v, kDistance == 1 ? 0xb1 : 0x4e);
  }
  static CG_HD float sum(Floats v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

template <>
struct Lanes<Doubles> {
  static constexpr int kCount = 4;
  static CG_HD uint64_t bits(LaneMask<double> m) { return static_cast<uint32_t>(_mm256_movemask_pd(m.m)); }
  static CG_HD LaneMask<double> mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(bits));
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane))};
  }
  static CG_HD void store_codes(uint8_t* p, Doubles code) {
    const __m128i c = _mm256_cvtpd_epi32(code.v);
    const __m128i words = _mm_packus_epi32(c, c);
    const int four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(p, &four, 4);
  }
  static CG_HD Doubles load_codes(const uint8_t* p) {
    int four;
    memcpy(&four, p, 4);
    return _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
  }
  template <int kDistance>
  static CG_HD Doubles exchange(Doubles v) {
    if constexpr (kDistance == 2) return _mm256_permute2f128_pd(v.v, v.v, 1);
    else return _mm256_permute_pd(v.v, 0x5);
  }
  static CG_HD double sum(Doubles v) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v.v), _mm256_extractf128_pd(v.v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

// The hardware prefetches too, but only a few instructions ahead.
constexpr int kPrefetchBytes = 2048;
constexpr int kChains = 2;

}  // namespace cg::avx2
