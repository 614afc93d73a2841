// What is particular to 512-bit registers, for x86/ and the headers of this folder.
#pragma once

#include <type_traits>

#include "bytes.h"

namespace cg::avx512 {

CG_HD __m512 broadcast(float v) { return _mm512_set1_ps(v); }
CG_HD __m512d broadcast(double v) { return _mm512_set1_pd(v); }
template <class A>
using FloatRegister = decltype(broadcast(A()));

// A bit for each lane.
template <class A>
struct LaneMask {
  using Bits = std::conditional_t<std::is_same_v<A, double>, __mmask8, __mmask16>;
  Bits m;
  friend CG_HD LaneMask operator&(LaneMask a, LaneMask b) { return {static_cast<Bits>(a.m & b.m)}; }
  friend CG_HD LaneMask operator|(LaneMask a, LaneMask b) { return {static_cast<Bits>(a.m | b.m)}; }
  friend CG_HD LaneMask operator!(LaneMask a) { return {static_cast<Bits>(~a.m)}; }
};

template <int kPredicate>
CG_HD LaneMask<float> compare(__m512 a, __m512 b) {
  return {_mm512_cmp_ps_mask(a, b, kPredicate)};
}
template <int kPredicate>
CG_HD LaneMask<double> compare(__m512d a, __m512d b) {
  return {_mm512_cmp_pd_mask(a, b, kPredicate)};
}
CG_HD __m512 blend(LaneMask<float> m, __m512 a, __m512 b) { return _mm512_mask_blend_ps(m.m, b, a); }
CG_HD __m512d blend(LaneMask<double> m, __m512d a, __m512d b) { return _mm512_mask_blend_pd(m.m, b, a); }
CG_HD __m512 round_up(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
CG_HD __m512d round_up(__m512d a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
CG_HD __m512 round_down(__m512 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

CG_HD void stream_register(void* p, Register v) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
CG_HD void store_half(void* p, HalfRegister v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
CG_HD void stream_half(void* p, HalfRegister v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }

// The low 16 bits of each 32-bit lane.
CG_HD HalfRegister narrow_lanes(Register v) { return _mm512_cvtepi32_epi16(v); }
// 16-bit lanes: the even ones of one register and the odd ones of the other.
CG_HD Register blend_odd(Register even, Register odd) { return _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd); }
// `rounded`, but a quiet NaN where v is NaN.
CG_HD Register or_quiet_nan(Register rounded, __m512 v) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, _mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
}

// The largest of lanes of kBytes each, of which all are positive, lane by lane of a quarter of the register.
template <int kBytes>
CG_HD __m128i larger_of(__m128i a, __m128i b) {
  if constexpr (kBytes == 2) return _mm_max_epi16(a, b);
  else return _mm_max_epi32(a, b);
}
template <int kBytes>
CG_HD __m128i largest_quarter(Register v) {
  const __m256i low = low_half(v), high = high_half(v);
  const __m256i half = kBytes == 2 ? _mm256_max_epi16(low, high) : _mm256_max_epi32(low, high);
  return larger_of<kBytes>(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

CG_HD __m128i load_quarter(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
CG_HD Register join_quarters(__m128i a, __m128i b, __m128i c, __m128i d) {
  return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2), d, 3);
}

// The low bit of each byte; the low byte of each 16-bit lane; and of each 32-bit lane.
CG_HD void store_low_bits(uint8_t* to, Register bytes) {
  const uint64_t bits = _mm512_test_epi8_mask(bytes, bytes);
  memcpy(to, &bits, sizeof(bits));
}
CG_HD void store_bytes_of_words(uint8_t* to, Register words) { store_half(to, _mm512_cvtepi16_epi8(words)); }
CG_HD void store_bytes_of_dwords(uint8_t* to, Register dwords) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(dwords));
}
// Bits as bytes of 0 or 1.
CG_HD Register load_bits_as_bytes(const uint8_t* from) {
  uint64_t bits;
  memcpy(&bits, from, sizeof(bits));
  return _mm512_maskz_set1_epi8(bits, 1);
}
// Loads codes that were just stored, in the pieces they may have been stored in: a load wider than the stores before it
// waits for the store buffer to drain.
CG_HD Register load_stored_codes(const uint8_t* p) {
  return join_quarters(load_quarter(p), load_quarter(p + 16), load_quarter(p + 32), load_quarter(p + 48));
}

}  // namespace cg::avx512
