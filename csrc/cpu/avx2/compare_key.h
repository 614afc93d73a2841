// Compare keys (math/dtype.h): 16 of 16 bits or 8 floats in a register; masks have all bits of a lane, or none.
#pragma once

#include "tables.h"

#include "../x86/compare_key.h"
#include "../x86/search_codes.h"

namespace cg::avx2 {

// A table has 8 entries, repeated in each half of a register; an index is the two byte positions of an entry.
template <class T>
struct CompareKey : CompareKey16<T, CompareKey<T>> {
  using Base = CompareKey16<T, CompareKey>;
  using Base::all, Base::indices, Base::max_magnitude;
  using typename Base::Index;
  static constexpr int kSearchBits = std::is_same_v<T, bf16> ? 5 : 6, kCompareBits = 2, kHalvesBits = 5;
  static constexpr bool kArithmetic = true, kHoldsBlock = true;
  static constexpr int kGroup = 2, kEntries = 8;
  static constexpr int kIndexStart = 0x0100, kIndexUnit = 0x0202;
  using Mask = Register;

  static CG_HD CompareKey load_without_prefetch(const int16_t* p) { return {{cg::avx2::load_without_prefetch(p)}}; }
  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm256_cmpgt_epi16(a.v, b.v); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) { return _mm256_andnot_si256(greater(a, high), m); }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {{_mm256_and_si256(m, a.v)}}; }
  static CG_HD Index masked(Mask m, Index a) { return _mm256_and_si256(m, a); }
  template <size_t kVecs>
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[kVecs]) {
    for (size_t i = 0; i < kVecs; i += 2, to += 4) {
      store_signs(to, _mm256_permute4x64_epi64(_mm256_packs_epi16(m[i], m[i + 1]), 0xd8));
    }
  }
  template <size_t kVecs>
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[kVecs], const Mask (&high)[kVecs]) {
    const __m256i upper_bytes = _mm256_set1_epi16(static_cast<short>(0xff00));
    for (size_t i = 0; i < kVecs; ++i, to += 4) store_signs(to, _mm256_blendv_epi8(low[i], high[i], upper_bytes));
  }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return _mm256_blendv_epi8(b, a, m); }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {{_mm256_blendv_epi8(b.v, a.v, m)}}; }
  static CG_HD bool any_above(CompareKey largest, int16_t most) {
    return _mm256_movemask_epi8(greater(largest, all(most))) != 0;
  }
  static CG_HD bool any_nan(const CompareKey (&x)[4]) {
    CompareKey largest = all(0);
    for (const CompareKey each : x) largest = max_magnitude(largest, each);
    return any_above(largest, kInfinityBits<T>);
  }
  // Loads floats in the order of floats().
  static CG_HD Pair<Floats> load_floats(const float* p) {
    const __m256 low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + 8);
    if constexpr (std::is_same_v<T, f16>) return {low, high};
    const auto gather = [](__m256 v) {
      return Floats(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)));
    };
    return {gather(_mm256_shuffle_ps(low, high, 0x88)), gather(_mm256_shuffle_ps(low, high, 0xdd))};
  }
  // From lanes in the order of floats().
  static CG_HD Mask mask(Pair<LaneMask<float>> m) {
    return narrow(_mm256_castps_si256(m.first.m), _mm256_castps_si256(m.second.m));
  }
  static CG_HD Register narrow(__m256i first, __m256i second) {
    if constexpr (std::is_same_v<T, bf16>) return blend_odd(first, _mm256_slli_epi32(second, 16));
    else return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
  }
  static CG_HD Index load_indices(const uint8_t* codes) {
    const Register code = _mm256_cvtepu8_epi16(load_half(codes));
    return _mm256_add_epi16(_mm256_mullo_epi16(code, indices(kIndexUnit)), indices(kIndexStart));
  }
  static CG_HD Index raise(Index a, Mask m, int by) { return _mm256_add_epi16(a, _mm256_and_si256(m, indices(by))); }
  template <int kRegisters>
  static CG_HD CompareKey look_up(const CompareKey* table, Index index) {
    if constexpr (kRegisters == 1) {
      return {{_mm256_shuffle_epi8(table[0].v, index)}};
    } else {
      // The index bit that selects the half, moved to the top of each byte.
      static_assert(kRegisters <= 4);
      constexpr int kHalf = kRegisters / 2;
      const Mask upper = _mm256_slli_epi16(index, kRegisters == 2 ? 3 : 2);
      return select(upper, look_up<kHalf>(table + kHalf, index), look_up<kHalf>(table, index));
    }
  }
  template <int kWidth, size_t kVecs>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[kVecs]) {
    for (size_t i = 0; i < kVecs; i += 2, to += 4 * kWidth) {
      const __m256i bytes = _mm256_packus_epi16(codes[i], codes[i + 1]);
      bitpack_register<kWidth>(_mm256_permute4x64_epi64(bytes, 0xd8), to);
    }
  }
};

template <>
struct CompareKey<double> : NoCompareKey {};

template <>
struct CompareKey<float> : CompareKey32<CompareKey<float>> {
  static constexpr int kSearchBits = 2, kCompareBits = 2, kGroup = 4;
  static constexpr bool kArithmetic = true, kHoldsBlock = false;
  using Mask = __m256;
  using Index = Floats;

  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) { return _mm256_andnot_ps(greater(a, high), m); }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {{_mm256_and_ps(m, a.v)}}; }
  // Puts the bytes of four vectors in order after packs_*.
  static CG_HD __m256i in_order(__m256i bytes) {
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[kGroup]) {
    const auto words = [&](int i) {
      return _mm256_packs_epi32(_mm256_castps_si256(m[i]), _mm256_castps_si256(m[i + 1]));
    };
    store_signs(to, in_order(_mm256_packs_epi16(words(0), words(2))));
  }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[kGroup], const Mask (&high)[kGroup]) {
    const auto both = [&](int i) {
      return _mm256_blend_epi16(_mm256_castps_si256(low[i]), _mm256_castps_si256(high[i]), 0xaa);
    };
    for (int i = 0; i < kGroup; i += 2, to += 4) {
      store_signs(to, _mm256_permute4x64_epi64(_mm256_packs_epi16(both(i), both(i + 1)), 0xd8));
    }
  }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return _mm256_blendv_ps(b, a, m); }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {{_mm256_blendv_ps(b.v, a.v, m)}}; }
  static CG_HD bool any_nan(const float* x) {
    __m256 nan = _mm256_setzero_ps();
    for (int i = 0; i < 64; i += 2 * kCount) {
      nan = _mm256_or_ps(nan, _mm256_cmp_ps(load(x + i).v, load(x + i + kCount).v, _CMP_UNORD_Q));
    }
    return _mm256_movemask_ps(nan) != 0;
  }
  static CG_HD bool any_above(CompareKey largest, float most) {
    return _mm256_movemask_epi8(_mm256_cmpgt_epi32(largest.bits(), all(most).bits())) != 0;
  }
  static CG_HD Index whole(Floats from) { return from; }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[kGroup]) {
    const auto words = [&](int i) {
      return _mm256_packs_epi32(_mm256_cvtps_epi32(codes[i].v), _mm256_cvtps_epi32(codes[i + 1].v));
    };
    bitpack_register<kWidth>(in_order(_mm256_packus_epi16(words(0), words(2))), to);
  }
};

}  // namespace cg::avx2
