// Tables of numbers, looked up by codes.
#pragma once

#include "bits.h"

namespace cg::avx2 {

// The packed codes of a block's 16 elements from `first` on, in the low bits of each lane with garbage above: of both
// halves, or of the even and the odd elements.
template <int kWidth, bool kEvenOdd>
CG_HD void packed_indices(const uint8_t* packed, int first, __m256i& one, __m256i& other) {
  static_assert(kWidth <= 4);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto load = [&](int bytes) {
    int word;
    memcpy(&word, packed + bytes, 4);
    return _mm256_set1_epi32(word);
  };
  if constexpr (kWidth == 4 && kEvenOdd) {
    long long words;
    memcpy(&words, packed + first / 2, 8);
    const __m256i halves = _mm256_permutevar8x32_epi32(_mm256_set1_epi64x(words), _mm256_srli_epi32(lane, 2));
    const __m256i place = _mm256_slli_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(3)), 3);
    one = _mm256_srlv_epi32(halves, place);
    other = _mm256_srli_epi32(one, 4);
  } else if constexpr (kWidth == 4) {
    const __m256i place = _mm256_slli_epi32(lane, 2);
    one = _mm256_srlv_epi32(load(first / 2), place);
    other = _mm256_srlv_epi32(load(first / 2 + 4), place);
  } else {
    const __m256i word = load(first * kWidth / 32 * 4);
    const __m256i place = _mm256_mullo_epi32(lane, _mm256_set1_epi32(kEvenOdd ? 2 * kWidth : kWidth));
    one = _mm256_srlv_epi32(word, _mm256_add_epi32(place, _mm256_set1_epi32(first * kWidth % 32)));
    other = _mm256_srli_epi32(one, kEvenOdd ? kWidth : 8 * kWidth);
  }
}

template <class V>
struct LargeTable;
template <>
struct LargeTable<Floats> {
  const float* entries;
  CG_HD LargeTable(const float* from, int) : entries(from) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_i32gather_ps(entries, index, 4);
  }
};
template <>
struct LargeTable<Doubles> {
  const double* entries;
  CG_HD LargeTable(const double* from, int) : entries(from) {}
  CG_HD Doubles at(const uint8_t* codes) const {
    int four;
    memcpy(&four, codes, 4);
    return _mm256_i32gather_pd(entries, _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)), 8);
  }
};

template <class V>
struct SmallTable {
  static constexpr int kSize = 0;
};
// Indexed by the low 4 bits of an index, or the low 2; fewer entries repeat.
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  Floats low, high;
  CG_HD SmallTable(const float* from, int size) {
    float entries[kSize];
    for (int i = 0; i < kSize; ++i) entries[i] = from[i % size];
    low = Io<float>::load(entries);
    high = Io<float>::load(entries + 8);
  }
  template <int kWidth>
  CG_HD Floats look_up(__m256i index) const {
    if constexpr (kWidth <= 2) return _mm256_permutevar_ps(low.v, index);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign is bit 3
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low.v, index), _mm256_permutevar8x32_ps(high.v, index), upper);
  }
};

// The entries for the 2-bit codes of a block's 16 elements from `first` on; and those times dy, added to the sums.
template <bool kEvenOdd>
CG_HD Pair<Floats> weights_of(const uint8_t* packed, const SmallTable<Floats>& weights, int first) {
  __m256i one, other;
  packed_indices<2, kEvenOdd>(packed, first, one, other);
  return {weights.template look_up<2>(one), weights.template look_up<2>(other)};
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
  const auto where = [](Floats dy, Floats weight) { return Floats(_mm256_and_ps(dy.v, (weight != Floats(0.f)).m)); };
  const Pair<Floats> weight = weights_of<std::is_same_v<T, bf16>>(packed, weights, first);
  const Pair<Floats> dy = load_pair(grad_y + first);
  sums = mul_add(Pair{where(dy.first, weight.first), where(dy.second, weight.second)}, weight, sums);
}
template <class T>
CG_HD void add_pair_of(float* to, Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256 low = _mm256_unpacklo_ps(v.first.v, v.second.v), high = _mm256_unpackhi_ps(v.first.v, v.second.v);
    v = {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  Io<float>::store(to, Io<float>::load(to) + v.first);
  Io<float>::store(to + 8, Io<float>::load(to + 8) + v.second);
}

// backward_from_slopes_block of generic/slopes.h straight from the packed codes. bfloat16 goes in even and odd places:
// a NaN of dy has nothing in its lower half and a product makes it quiet, so rounding keeps it; a NaN slope is made
// quiet first.
template <int kWidth, class T>
CG_HD void backward_from_slopes_block(const T* grad_y, const uint8_t* packed, const SmallTable<Floats>& table,
                                      T* grad_x, bool stream) {
  constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
  SmallTable<Floats> slopes = table;
  if constexpr (kEvenOdd) {
    const auto quiet = [](Floats v) { return select(v != v, round_to<bf16>(v), v); };
    slopes.low = quiet(slopes.low);
    slopes.high = quiet(slopes.high);
  }
  for (int i = 0; i < 64; i += 16) {
    __m256i first, second;
    packed_indices<kWidth, kEvenOdd>(packed, i, first, second);
    const Pair<Floats> slope{slopes.template look_up<kWidth>(first), slopes.template look_up<kWidth>(second)};
    store_pair(grad_x + i, times_slope(load_pair(grad_y + i), slope), stream);
  }
}

template <class V>
constexpr bool kAddsWeighed = std::is_same_v<V, Floats>;

}  // namespace cg::avx2
