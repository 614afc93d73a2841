// Compare keys (math/dtype.h): 32 of 16 bits or 16 floats in a register; masks have a bit for each lane.
#pragma once

#include "tables.h"

#include "../x86/compare_key.h"
#include "../x86/search_codes.h"

namespace cg::avx512 {

CG_HD void store_word(uint8_t* to, uint64_t bits) { memcpy(to, &bits, sizeof(bits)); }
// 2 bits each: of one mask and of another.
CG_HD void store_words(uint8_t* to, uint64_t low, uint64_t high) {
  const __m512i lower = _mm512_maskz_set1_epi8(low, 1);
  bitpack_register<2>(_mm512_mask_add_epi8(lower, high, lower, _mm512_set1_epi8(2)), to);
}

template <class T>
struct CompareKey : CompareKey16<T, CompareKey<T>> {
  using Base = CompareKey16<T, CompareKey>;
  using Base::all, Base::indices, Base::load, Base::max_magnitude;
  using typename Base::Index;
  static constexpr int kSearchBits = 8, kCompareBits = 2, kHalvesBits = 5;
  static constexpr bool kArithmetic = true, kHoldsBlock = false;
  static constexpr int kGroup = 2, kEntries = 32, kIndexStart = 0, kIndexUnit = 1;
  using Mask = __mmask32;

  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm512_cmpgt_epi16_mask(a.v, b.v); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) {
    return _mm512_mask_cmple_epi16_mask(m, a.v, high.v);
  }
  static CG_HD uint64_t word(const Mask (&m)[2]) { return _mm512_kunpackd(m[1], m[0]); }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[2]) { store_word(to, word(m)); }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[2], const Mask (&high)[2]) {
    store_words(to, word(low), word(high));
  }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) {
    return {{_mm512_mask_blend_epi16(m, b.v, a.v)}};
  }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return a ^ m ^ b; }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {{_mm512_maskz_mov_epi16(m, a.v)}}; }
  static CG_HD Index masked(Mask m, Index a) { return _mm512_maskz_mov_epi16(m, a); }
  static CG_HD bool any_above(CompareKey largest, int16_t most) { return greater(largest, all(most)) != 0; }
  static CG_HD bool any_nan(const int16_t* x) {
    return any_above(max_magnitude(max_magnitude(all(0), load(x)), load(x + 32)), kInfinityBits<T>);
  }
  // Loads floats in the order of floats().
  static CG_HD Pair<Floats> load_floats(const float* p) {
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    if constexpr (std::is_same_v<T, f16>) return {low, high};
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
  }
  // From lanes in the order of floats().
  static CG_HD Mask mask(Pair<LaneMask<float>> m) {
    if constexpr (std::is_same_v<T, f16>) return m.first.m | Mask{m.second.m} << 16;
    return static_cast<Mask>(spread_bits(m.first.m) | spread_bits(m.second.m) << 1);
  }
  static CG_HD Register narrow(Register first, Register second) {
    if constexpr (std::is_same_v<T, bf16>) return blend_odd(first, _mm512_slli_epi32(second, 16));
    else return join_halves(narrow_lanes(first), narrow_lanes(second));
  }
  static CG_HD Index load_indices(const uint8_t* codes) { return _mm512_cvtepu8_epi16(load_half(codes)); }
  static CG_HD Index raise(Index a, Mask m, int by) { return _mm512_mask_add_epi16(a, m, a, indices(by)); }
  template <int kRegisters>
  static CG_HD CompareKey look_up(const CompareKey* table, Index index) {
    if constexpr (kRegisters == 1) return {{_mm512_permutexvar_epi16(index, table[0].v)}};
    else if constexpr (kRegisters == 2) return {{_mm512_permutex2var_epi16(table[0].v, index, table[1].v)}};
    else
      return select(_mm512_test_epi16_mask(index, indices(64)),  // its bit for the upper half
                    look_up<2>(table + 2, index), look_up<2>(table, index));
  }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[2]) {
    bitpack_register<kWidth>(join_halves(_mm512_cvtepi16_epi8(codes[0]), _mm512_cvtepi16_epi8(codes[1])), to);
  }
};

template <>
struct CompareKey<double> : NoCompareKey {};

template <>
struct CompareKey<float> : CompareKey32<CompareKey<float>> {
  static constexpr int kSearchBits = 2, kCompareBits = 2, kGroup = 4;
  static constexpr bool kArithmetic = true, kHoldsBlock = false;
  using Mask = __mmask16;
  using Index = Register;

  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) {
    return _mm512_mask_cmp_ps_mask(m, a.v, high.v, _CMP_LE_OQ);
  }
  static CG_HD uint64_t word(const Mask (&m)[4]) {
    return _mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0]));
  }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[4]) { store_word(to, word(m)); }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[4], const Mask (&high)[4]) {
    store_words(to, word(low), word(high));
  }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {{_mm512_mask_blend_ps(m, b.v, a.v)}}; }
  static CG_HD bool any_nan(const float* x) {
    return (_mm512_cmp_ps_mask(load(x).v, load(x + 16).v, _CMP_UNORD_Q) |
            _mm512_cmp_ps_mask(load(x + 32).v, load(x + 48).v, _CMP_UNORD_Q)) != 0;
  }
  static CG_HD bool any_above(CompareKey largest, float most) {
    return _mm512_cmpgt_epi32_mask(largest.bits(), all(most).bits()) != 0;
  }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return static_cast<Mask>(a ^ m ^ b); }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {{_mm512_maskz_mov_ps(m, a.v)}}; }
  static CG_HD Index whole(Floats from) { return _mm512_cvtps_epi32(from.v); }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[4]) {
    const auto bytes = [&](int i) { return _mm512_cvtepi32_epi8(codes[i]); };
    bitpack_register<kWidth>(join_quarters(bytes(0), bytes(1), bytes(2), bytes(3)), to);
  }
};

}  // namespace cg::avx512
