// Tables of numbers, looked up by codes.
#pragma once

#include "bits.h"

namespace cg::avx512 {

template <class V>
struct LargeTable;
template <>
struct LargeTable<Floats> {
  const float* entries;
  CG_HD LargeTable(const float* from, int) : entries(from) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_i32gather_ps(index, entries, 4);
  }
};
template <>
struct LargeTable<Doubles> {
  const double* entries;
  CG_HD LargeTable(const double* from, int) : entries(from) {}
  CG_HD Doubles at(const uint8_t* codes) const {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm512_i32gather_pd(_mm256_cvtepu8_epi32(eight), entries, 8);
  }
};

template <class V>
struct SmallTable {
  static constexpr int kSize = 0;
};
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  Floats entries;
  CG_HD SmallTable(const float* from, int size)
      : entries(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << size) - 1), from)) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), entries.v);
  }
};

// backward_from_slopes_block of generic/slopes.h for 32 numbers of bf16 at a time: those in even and those in odd
// places become floats by a shift and a mask, and are rounded together as the upper and lower halves of their bits. A
// NaN of dy has nothing in its lower half and a product makes it quiet, so rounding keeps it; a NaN slope is made so
// first.
template <int kWidth>
CG_HD void backward_from_slopes_block(const bf16* grad_y, const uint8_t* packed, const SmallTable<Floats>& table,
                                      bf16* grad_x, bool stream) {
  uint8_t codes[64];
  bitunpack<kWidth>(packed, codes);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const Floats entries = table.entries, slopes = select(entries != entries, round_to<bf16>(entries), entries);
  const auto product = [&](__m512i dy, __m512i index) {
    const Floats slope = _mm512_permutexvar_ps(index, slopes.v);  // which heeds the low 4 bits of an index
    return _mm512_castps_si512(times_slope(Floats(_mm512_castsi512_ps(dy)), slope).v);
  };
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  for (int i = 0; i < 64; i += 32) {
    const __m512i dy = _mm512_loadu_si512(grad_y + i);
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i even = product(_mm512_slli_epi32(dy, 16), index);
    const __m512i odd = product(_mm512_and_si512(dy, upper), _mm512_srli_epi32(index, 16));
    const __m512i high = _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(even, 16), odd);
    const __m512i low = _mm512_mask_blend_epi16(kOdd, even, _mm512_slli_epi32(odd, 16));
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i beyond_even = _mm512_adds_epu16(low, _mm512_and_si512(high, one));
    const __m512i dx = _mm512_mask_add_epi16(high, _mm512_cmpgt_epu16_mask(beyond_even, half), high, one);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(grad_x + i), dx);
    else _mm512_storeu_si512(grad_x + i, dx);
  }
}

template <class V>
constexpr bool kAddsWeighed = false;

}  // namespace cg::avx512
