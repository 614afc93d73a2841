// Numbers as what is compared fast (dtype.h), 32 of 16 bits or 16 floats in a register.
#pragma once

#include "vec.h"

namespace cg::CG_ISA {

CG_HD void store_bits(uint8_t* to, uint64_t bits) { memcpy(to, &bits, sizeof(bits)); }
CG_HD void store_states(uint8_t* to, uint64_t low, uint64_t high) {
  for (int half = 0; half < 2; ++half) {
    const uint64_t word = spread_bits(low >> 32 * half) | spread_bits(high >> 32 * half) << 1;
    memcpy(to + 8 * half, &word, sizeof(word));
  }
}

template <class T>
struct CompareKey {
  static constexpr int kSearchBits = 8, kCompareBits = 0;
  static constexpr bool kArithmetic = false, kHoldsBlock = false;
  static constexpr int kCount = 32, kEntries = 32, kIndexStart = 0, kIndexUnit = 1;
  using Element = int16_t;
  using Mask = __mmask32;
  using Index = __m512i;
  __m512i v;
  static CG_HD CompareKey all(int from) { return {indices(from)}; }
  static CG_HD CompareKey load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
  static CG_HD void store(int16_t* p, CompareKey a) { _mm512_storeu_si512(p, a.v); }
  static CG_HD void stream(int16_t* p, CompareKey a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.v); }
  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm512_cmpgt_epi16_mask(a.v, b.v); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) { return _mm512_mask_cmple_epi16_mask(m, a.v, high.v); }
  static CG_HD uint64_t bits(const Mask (&m)[2]) { return m[0] | uint64_t{m[1]} << 32; }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[2]) { cg::CG_ISA::store_bits(to, bits(m)); }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[2], const Mask (&high)[2]) {
    cg::CG_ISA::store_states(to, bits(low), bits(high));
  }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {_mm512_mask_blend_epi16(m, b.v, a.v)}; }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {_mm512_maskz_mov_epi16(m, a.v)}; }
  static CG_HD CompareKey farther(CompareKey a, CompareKey b) {
    return {_mm512_max_epi16(a.v, _mm512_and_si512(b.v, _mm512_set1_epi16(0x7fff)))};
  }
  static CG_HD bool any_beyond(CompareKey farthest, int16_t most) { return greater(farthest, all(most)) != 0; }
  static CG_HD bool any_nan(const int16_t* x) {
    return any_beyond(farther(farther(all(0), load(x)), load(x + 32)), kInfinityBits<T>);
  }
  CG_HD Pair<Floats> floats() const { return split<T>(v); }
  // Ties of bfloat16 go up.
  static CG_HD CompareKey rounded(Pair<Floats> from) { return {join<T, false>(from)}; }
  static CG_HD Index indices(int from) { return _mm512_set1_epi16(static_cast<short>(from)); }
  static CG_HD Index load_indices(const uint8_t* codes) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
  static CG_HD Index raise(Index a, Mask m, int by) { return _mm512_mask_add_epi16(a, m, a, indices(by)); }
  template <int kRegisters>
  static CG_HD CompareKey look_up(const CompareKey* table, Index index) {
    if constexpr (kRegisters == 1) return {_mm512_permutexvar_epi16(index, table[0].v)};
    else if constexpr (kRegisters == 2) return {_mm512_permutex2var_epi16(table[0].v, index, table[1].v)};
    else return select(_mm512_test_epi16_mask(index, indices(64)),  // its bit for the upper half
                       look_up<2>(table + 2, index), look_up<2>(table, index));
  }
  static CG_HD Index whole(CompareKey from) { return from.v; }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[2]) {
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(codes[0]));
    bitpack_block<kWidth>(_mm512_inserti64x4(low, _mm512_cvtepi16_epi8(codes[1]), 1), to);
  }
};

template <>
struct CompareKey<double> {
  static constexpr int kSearchBits = 0, kCompareBits = 0;
  static constexpr bool kArithmetic = false;
};
template <>
struct CompareKey<float> {
  static constexpr int kSearchBits = 3, kCompareBits = 0;
  static constexpr bool kArithmetic = false, kHoldsBlock = false;
  static constexpr int kCount = 16, kEntries = 16, kIndexStart = 0, kIndexUnit = 1;
  using Element = float;
  using Mask = __mmask16;
  using Index = __m512i;
  __m512 v;
  static CG_HD CompareKey all(float from) { return {_mm512_set1_ps(from)}; }
  static CG_HD CompareKey load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static CG_HD void store(float* p, CompareKey a) { _mm512_storeu_ps(p, a.v); }
  static CG_HD void stream(float* p, CompareKey a) { _mm512_stream_ps(p, a.v); }
  static CG_HD Mask greater(CompareKey a, CompareKey b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) {
    return _mm512_mask_cmp_ps_mask(m, a.v, high.v, _CMP_LE_OQ);
  }
  static CG_HD uint64_t bits(const Mask (&m)[4]) {
    return m[0] | uint64_t{m[1]} << 16 | uint64_t{m[2]} << 32 | uint64_t{m[3]} << 48;
  }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[4]) { cg::CG_ISA::store_bits(to, bits(m)); }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[4], const Mask (&high)[4]) {
    cg::CG_ISA::store_states(to, bits(low), bits(high));
  }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
  static CG_HD bool any_nan(const float* x) {
    return (_mm512_cmp_ps_mask(load(x).v, load(x + 16).v, _CMP_UNORD_Q) |
            _mm512_cmp_ps_mask(load(x + 32).v, load(x + 48).v, _CMP_UNORD_Q)) != 0;
  }
  static CG_HD CompareKey farther(CompareKey a, CompareKey b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b.v), _mm512_set1_epi32(0x7fffffff));
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), magnitude))};
  }
  static CG_HD bool any_beyond(CompareKey farthest, float most) {
    return _mm512_cmpgt_epi32_mask(_mm512_castps_si512(farthest.v), _mm512_castps_si512(all(most).v)) != 0;
  }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
  CG_HD Floats floats() const { return v; }
  static CG_HD CompareKey rounded(Floats from) { return {from.v}; }
  static CG_HD Index indices(int from) { return _mm512_set1_epi32(from); }
  static CG_HD Index raise(Index a, Mask m, int by) { return _mm512_mask_add_epi32(a, m, a, indices(by)); }
  template <int kRegisters>
  static CG_HD CompareKey look_up(const CompareKey* table, Index index) {
    static_assert(kRegisters == 1);
    return {_mm512_permutexvar_ps(index, table[0].v)};
  }
  static CG_HD Index whole(CompareKey from) { return _mm512_cvtps_epi32(from.v); }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[4]) {
    const auto bytes = [&](int i) { return _mm512_cvtepi32_epi8(codes[i]); };
    bitpack_block<kWidth>(four(bytes(0), bytes(1), bytes(2), bytes(3)), to);
  }
};

}  // namespace cg::CG_ISA
