// Bochs 2.7 rounds what is halfway between two float16s away from zero, where a processor rounds to the even one. The
// tests include this first, for a conversion that Bochs gets right too.
#pragma once

#if defined(__AVX512BW__)
#include <immintrin.h>

namespace {

inline __m256i nearest_halves(__m512 v) {
  const __m256i low = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m256i high = _mm256_add_epi16(low, _mm256_set1_epi16(1));
  const __mmask16 even = ~_mm256_movepi16_mask(_mm256_slli_epi16(low, 15));
  const __mmask16 down = _mm512_mask_cmp_ps_mask(even, _mm512_sub_ps(v, _mm512_cvtph_ps(low)),
                                                 _mm512_sub_ps(_mm512_cvtph_ps(high), v), _CMP_EQ_OQ);
  const __m512i bits = _mm512_castps_si512(v), less = _mm512_mask_sub_epi32(bits, down, bits, _mm512_set1_epi32(1));
  return _mm512_maskz_cvtps_ph(0xffff, _mm512_castsi512_ps(less), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace
#define _mm512_cvtps_ph(v, rounding)                                                 \
  ((rounding) == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) ? nearest_halves(v) \
                                                                 : _mm512_maskz_cvtps_ph(0xffff, v, rounding))
#endif
