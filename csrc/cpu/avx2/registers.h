// What is particular to 256-bit registers, for x86/ and the headers of this folder.
#pragma once

#include "bytes.h"

namespace cg::avx2 {

CG_HD __m256 broadcast(float v) { return _mm256_set1_ps(v); }
CG_HD __m256d broadcast(double v) { return _mm256_set1_pd(v); }
template <class A>
using FloatRegister = decltype(broadcast(A()));

CG_HD __m256 bit_and(__m256 a, __m256 b) { return _mm256_and_ps(a, b); }
CG_HD __m256d bit_and(__m256d a, __m256d b) { return _mm256_and_pd(a, b); }
CG_HD __m256 bit_or(__m256 a, __m256 b) { return _mm256_or_ps(a, b); }
CG_HD __m256d bit_or(__m256d a, __m256d b) { return _mm256_or_pd(a, b); }
CG_HD __m256 bit_not(__m256 a) { return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1))); }
CG_HD __m256d bit_not(__m256d a) { return _mm256_xor_pd(a, _mm256_castsi256_pd(_mm256_set1_epi32(-1))); }

// All bits of a lane set, or none.
template <class A>
struct LaneMask {
  FloatRegister<A> m;
  friend CG_HD LaneMask operator&(LaneMask a, LaneMask b) { return {bit_and(a.m, b.m)}; }
  friend CG_HD LaneMask operator|(LaneMask a, LaneMask b) { return {bit_or(a.m, b.m)}; }
  friend CG_HD LaneMask operator!(LaneMask a) { return {bit_not(a.m)}; }
};

template <int kPredicate>
CG_HD LaneMask<float> compare(__m256 a, __m256 b) {
  return {_mm256_cmp_ps(a, b, kPredicate)};
}
template <int kPredicate>
CG_HD LaneMask<double> compare(__m256d a, __m256d b) {
  return {_mm256_cmp_pd(a, b, kPredicate)};
}
CG_HD __m256 blend(LaneMask<float> m, __m256 a, __m256 b) { return _mm256_blendv_ps(b, a, m.m); }
CG_HD __m256d blend(LaneMask<double> m, __m256d a, __m256d b) { return _mm256_blendv_pd(b, a, m.m); }
CG_HD __m256 round_up(__m256 a) { return _mm256_ceil_ps(a); }
CG_HD __m256d round_up(__m256d a) { return _mm256_ceil_pd(a); }
CG_HD __m256 round_down(__m256 a) { return _mm256_floor_ps(a); }

CG_HD void stream_register(void* p, Register v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
CG_HD void stream_half(void* p, HalfRegister v) { _mm_stream_si128(static_cast<__m128i*>(p), v); }

// The low 16 bits of each 32-bit lane; the upper ones are zero.
CG_HD HalfRegister narrow_lanes(Register v) { return _mm_packus_epi32(low_half(v), high_half(v)); }
// 16-bit lanes: the even ones of one register and the odd ones of the other.
CG_HD Register blend_odd(Register even, Register odd) { return _mm256_blend_epi16(even, odd, 0xaa); }
// `rounded`, but a quiet NaN where v is NaN.
CG_HD Register or_quiet_nan(Register rounded, __m256 v) {
  const __m256 quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, is_nan));
}

// The largest of lanes of kBytes each, of which all are positive, lane by lane of a half of the register.
template <int kBytes>
CG_HD __m128i larger_of(__m128i a, __m128i b) {
  if constexpr (kBytes == 2) return _mm_max_epi16(a, b);
  else return _mm_max_epi32(a, b);
}
template <int kBytes>
CG_HD __m128i largest_quarter(Register v) {
  return larger_of<kBytes>(low_half(v), high_half(v));
}

CG_HD HalfRegister load_quarter(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// The sign of each byte as a bit.
CG_HD void store_signs(uint8_t* to, Register bytes) {
  const int bits = _mm256_movemask_epi8(bytes);
  memcpy(to, &bits, sizeof(bits));
}
// The low bit of each byte; the low byte of each 16-bit lane; and of each 32-bit lane.
CG_HD void store_low_bits(uint8_t* to, Register bytes) { store_signs(to, _mm256_slli_epi16(bytes, 7)); }
CG_HD void store_bytes_of_words(uint8_t* to, Register words) {
  store_half(to, low_half(_mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08)));
}
CG_HD void store_bytes_of_dwords(uint8_t* to, Register dwords) {
  const __m256i low = _mm256_packus_epi32(dwords, dwords), bytes = _mm256_packus_epi16(low, low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(low_half(bytes), high_half(bytes)));
}
// Bits as bytes of 0 or 1.
CG_HD Register load_bits_as_bytes(const uint8_t* from) {
  int bits;
  memcpy(&bits, from, sizeof(bits));
  const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i place = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), of_byte);
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, place), place), _mm256_set1_epi8(1));
}
// Loads codes that were just stored, in the pieces they may have been stored in: a load wider than the stores before it
// waits for the store buffer to drain.
CG_HD Register load_stored_codes(const uint8_t* p) {
  const auto sixteen = [](const uint8_t* p) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), reinterpret_cast<const __m64*>(p + 8)));
  };
  return join_halves(sixteen(p), sixteen(p + 16));
}

}  // namespace cg::avx2
