// Compare keys (math/dtype.h): 8 of 16 bits or 4 floats in a register; masks have all bits of a lane, or none.
#pragma once

#include "../generic/no_compare_key.h"
#include "search_codes.h"
#include "tables.h"

namespace cg::neon {

// A table has 8 entries in a register, and is looked up in up to four of them at once; an index is the two byte
// positions of an entry.
template <class T>
struct CompareKey {
  static constexpr int kSearchBits = 6, kCompareBits = 2;
  static constexpr bool kArithmetic = true, kHoldsBlock = true;
  static constexpr int kCount = 8, kGroup = 4, kEntries = 8;
  static constexpr int kIndexStart = 0x0100, kIndexUnit = 0x0202;
  using Element = int16_t;
  using Index = uint16x8_t;
  using Mask = uint16x8_t;
  int16x8_t v;

  static CG_HD Index indices(int from) { return vdupq_n_u16(static_cast<uint16_t>(from)); }
  static CG_HD CompareKey all(int from) { return {vdupq_n_s16(static_cast<int16_t>(from))}; }
  static CG_HD CompareKey of(uint16x8_t bits) { return {vreinterpretq_s16_u16(bits)}; }
  CG_HD uint16x8_t bits() const { return vreinterpretq_u16_s16(v); }
  static CG_HD CompareKey load(const int16_t* p) { return {neon::load<int16x8_t>(p)}; }
  static CG_HD CompareKey load_without_prefetch(const int16_t* p) { return load(p); }
  static CG_HD void store(int16_t* p, CompareKey a) { neon::store(p, a.v); }
  static CG_HD void stream(int16_t* p, CompareKey a) { store(p, a); }

  static CG_HD Mask greater(CompareKey a, CompareKey b) { return vcgtq_s16(a.v, b.v); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) { return vbicq_u16(m, greater(a, high)); }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return of(m & a.bits()); }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return vbslq_u16(m, a, b); }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {vbslq_s16(m, a.v, b.v)}; }
  template <size_t kVecs>
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[kVecs]) {
    uint8x16_t bytes[kVecs / 2];
    for (size_t i = 0; i < kVecs; i += 2) bytes[i / 2] = narrow(m[i], m[i + 1]);
    store_bits_of(to, bytes);
  }
  template <size_t kVecs>
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[kVecs], const Mask (&high)[kVecs]) {
    uint8x16_t bytes[kVecs];
    const uint8x16_t lower = vreinterpretq_u8_u16(indices(0x00ff));
    for (size_t i = 0; i < kVecs; ++i) {
      bytes[i] = vbslq_u8(lower, vreinterpretq_u8_u16(low[i]), vreinterpretq_u8_u16(high[i]));
    }
    store_bits_of(to, bytes);
  }

  static CG_HD CompareKey clamp(CompareKey a, CompareKey low, CompareKey high) {
    return {vmaxq_s16(vminq_s16(a.v, high.v), low.v)};
  }

  // Magnitudes are those of the numbers. Ties of `rounded` to bfloat16 go up.
  static CG_HD CompareKey max_magnitude(CompareKey a, CompareKey b) {
    return {vmaxq_s16(a.v, vreinterpretq_s16_u16(b.bits() & indices(0x7fff)))};
  }
  static CG_HD bool any_above(CompareKey largest, int16_t most) { return vmaxvq_s16(largest.v) > most; }
  static CG_HD bool any_nan(const CompareKey (&x)[8]) {
    CompareKey largest = all(0);
    for (const CompareKey each : x) largest = max_magnitude(largest, each);
    return any_above(largest, kInfinityBits<T>);
  }

  CG_HD Pair<Floats> floats() const { return split<T>(bits()); }
  static CG_HD CompareKey rounded(Pair<Floats> from) { return of(join<T, false>(from)); }
  static CG_HD CompareKey level(Pair<Floats> from) { return of(join<T>(from)); }
  // Rounds down to T; `from` is not negative.
  static CG_HD CompareKey floor(Pair<Floats> from) {
    if constexpr (std::is_same_v<T, bf16>) {
      return of(join_rounded<bf16>(from));
    } else {
      const CompareKey nearest = of(join<f16>(from));
      return of(nearest.bits() + mask(nearest.floats() > from));
    }
  }
  // Loads floats in the order of floats().
  static CG_HD Pair<Floats> load_floats(const float* p) {
    const float32x4_t low = neon::load<float32x4_t>(p), high = neon::load<float32x4_t>(p + 4);
    if constexpr (std::is_same_v<T, bf16>) return {Floats(vuzp1q_f32(low, high)), Floats(vuzp2q_f32(low, high))};
    else return {Floats(low), Floats(high)};
  }
  // From lanes in the order of floats(): masks, and small integers.
  static CG_HD uint16x8_t in_order(uint32x4_t first, uint32x4_t second) {
    if constexpr (std::is_same_v<T, bf16>) return interleave(first, second);
    else return narrow(first, second);
  }
  static CG_HD Mask mask(Pair<LaneMask<float>> m) { return in_order(m.first.m, m.second.m); }
  static CG_HD Index whole(Pair<Floats> from) {
    return in_order(vcvtq_u32_f32(from.first.v), vcvtq_u32_f32(from.second.v));
  }
  static CG_HD Index whole(CompareKey from) { return from.bits(); }

  static CG_HD Index load_indices(const uint8_t* codes) {
    return vmlaq_u16(indices(kIndexStart), vmovl_u8(neon::load<uint8x8_t>(codes)), indices(kIndexUnit));
  }
  static CG_HD Index raise(Index a, Mask m, int by) { return vmlsq_u16(a, m, indices(by)); }  // m is -1 or 0
  template <int kRegisters>
  static CG_HD CompareKey look_up(const CompareKey* table, Index index) {
    const uint8x16_t at = vreinterpretq_u8_u16(index);
    const auto bytes = [&](int i) { return vreinterpretq_u8_s16(table[i].v); };
    uint8x16_t found;
    if constexpr (kRegisters == 1) found = vqtbl1q_u8(bytes(0), at);
    else if constexpr (kRegisters == 2) found = vqtbl2q_u8({{bytes(0), bytes(1)}}, at);
    else found = vqtbl4q_u8({{bytes(0), bytes(1), bytes(2), bytes(3)}}, at);
    return {vreinterpretq_s16_u8(found)};
  }
  template <int kWidth, size_t kVecs>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[kVecs]) {
    for (size_t i = 0; i < kVecs; i += 2, to += 2 * kWidth) {
      bitpack_register<kWidth>(narrow(codes[i], codes[i + 1]), to);
    }
  }
};

template <>
struct CompareKey<double> : NoCompareKey {};

template <>
struct CompareKey<float> {
  static constexpr int kSearchBits = 2, kCompareBits = 2, kCount = 4, kGroup = 4;
  static constexpr bool kArithmetic = true, kHoldsBlock = false;
  using Element = float;
  using Mask = uint32x4_t;
  using Index = Floats;
  float32x4_t v;

  static CG_HD CompareKey all(float from) { return {vdupq_n_f32(from)}; }
  static CG_HD CompareKey load(const float* p) { return {neon::load<float32x4_t>(p)}; }
  static CG_HD void store(float* p, CompareKey a) { neon::store(p, a.v); }
  static CG_HD void stream(float* p, CompareKey a) { store(p, a); }
  CG_HD uint32x4_t bits() const { return as_bits(v); }

  static CG_HD Mask greater(CompareKey a, CompareKey b) { return vcgtq_f32(a.v, b.v); }
  static CG_HD Mask at_most(Mask m, CompareKey a, CompareKey high) { return vbicq_u32(m, greater(a, high)); }
  static CG_HD CompareKey masked(Mask m, CompareKey a) { return {as_numbers(m & a.bits())}; }
  static CG_HD Index whole(Floats from) { return from; }
  static CG_HD Mask choose(Mask m, Mask a, Mask b) { return vbslq_u32(m, a, b); }
  static CG_HD CompareKey select(Mask m, CompareKey a, CompareKey b) { return {vbslq_f32(m, a.v, b.v)}; }
  static CG_HD void store_bits(uint8_t* to, const Mask (&m)[kGroup]) {
    store_bits_of(to, {narrow(narrow(m[0], m[1]), narrow(m[2], m[3]))});
  }
  static CG_HD void store_states(uint8_t* to, const Mask (&low)[kGroup], const Mask (&high)[kGroup]) {
    const auto both = [&](int i) { return interleave(low[i], high[i]); };
    store_bits_of(to, {narrow(both(0), both(1)), narrow(both(2), both(3))});
  }

  static CG_HD CompareKey max_magnitude(CompareKey a, CompareKey b) {
    return {as_numbers(vmaxq_u32(a.bits(), b.bits() & 0x7fffffffu))};
  }
  static CG_HD bool any_above(CompareKey largest, float most) {
    return vmaxvq_u32(largest.bits()) > bit_cast<uint32_t>(most);
  }
  static CG_HD bool any_nan(const float* x) {
    float32x4_t largest = load(x).v;  // FMAX hands on a NaN
    for (int i = kCount; i < 64; i += kCount) largest = vmaxq_f32(largest, load(x + i).v);
    const float of_all = vmaxvq_f32(largest);
    return of_all != of_all;
  }
  CG_HD Floats floats() const { return v; }
  static CG_HD CompareKey rounded(Floats from) { return {from.v}; }
  static CG_HD CompareKey level(Floats from) { return {from.v}; }
  static CG_HD CompareKey floor(Floats from) { return {from.v}; }
  static CG_HD Floats load_floats(const float* p) { return neon::load<float32x4_t>(p); }
  template <int kWidth>
  static CG_HD void store_codes(uint8_t* to, const Index (&codes)[kGroup]) {
    const auto words = [&](int i) { return narrow(vcvtq_u32_f32(codes[i].v), vcvtq_u32_f32(codes[i + 1].v)); };
    bitpack_register<kWidth>(narrow(words(0), words(2)), to);
  }
};

}  // namespace cg::neon
