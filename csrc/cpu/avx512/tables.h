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
// Fewer entries repeat.
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  Floats entries;
  CG_HD SmallTable(const float* from, int size) {
    float repeated[kSize];
    for (int i = 0; i < kSize; ++i) repeated[i] = from[i % size];
    entries = Io<float>::load(repeated);
  }
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

// The entries for the 2-bit codes of a block's 32 elements from `first` on, of both halves or of the even and the odd
// elements; and those times dy, added to the sums.
template <bool kEvenOdd>
CG_HD Pair<Floats> weights_of(const uint8_t* packed, const SmallTable<Floats>& weights, int first) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto half = [&](int at) {
    int word;
    memcpy(&word, packed + first / 4 + at, sizeof(word));
    return _mm512_set1_epi32(word);
  };
  __m512i one, other;  // in the low bits of each lane, with others' above
  if constexpr (kEvenOdd) {
    const __m512i place = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2);
    one = _mm512_srlv_epi32(_mm512_mask_mov_epi32(half(0), 0xff00, half(4)), place);
    other = _mm512_srli_epi32(one, 2);
  } else {
    const __m512i place = _mm512_slli_epi32(lane, 1);
    one = _mm512_srlv_epi32(half(0), place), other = _mm512_srlv_epi32(half(4), place);
  }
  return {_mm512_permutevar_ps(weights.entries.v, one), _mm512_permutevar_ps(weights.entries.v, other)};
}
template <class T>
CG_HD void add_weighed(const T* grad_y, const uint8_t* packed, const SmallTable<Floats>& weights, int first,
                       Pair<Floats>& sums) {
  sums = mul_add(load_pair(grad_y + first), weights_of<std::is_same_v<T, bf16>>(packed, weights, first), sums);
}

// The same for terms of many channels, none of which may be infinity or NaN times 0; and those, added to numbers in
// memory.
template <class T>
CG_HD void add_each_weighed(const T* grad_y, const uint8_t* packed, const SmallTable<Floats>& weights, int first,
                            Pair<Floats>& sums) {
  const Pair<Floats> dy = load_pair(grad_y + first);
  const Pair<Floats> weight = weights_of<std::is_same_v<T, bf16>>(packed, weights, first);
  const auto add = [](Floats dy, Floats weight, Floats& sum) {
    sum = _mm512_mask3_fmadd_ps(dy.v, weight.v, sum.v, (weight != Floats(0.f)).m);
  };
  add(dy.first, weight.first, sums.first), add(dy.second, weight.second, sums.second);
}
template <class T>
CG_HD void add_pair_of(float* to, Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    v = {_mm512_permutex2var_ps(v.first.v, low, v.second.v), _mm512_permutex2var_ps(v.first.v, high, v.second.v)};
  }
  Io<float>::store(to, Io<float>::load(to) + v.first);
  Io<float>::store(to + 16, Io<float>::load(to + 16) + v.second);
}

template <class V>
constexpr bool kAddsWeighed = std::is_same_v<V, Floats>;

}  // namespace cg::avx512
