// 4 floats or 2 doubles in a register.
#pragma once

#include "registers.h"

#include "../generic/pair.h"

namespace cg::neon {

CG_HD float32x4_t broadcast(float v) { return vdupq_n_f32(v); }
CG_HD float64x2_t broadcast(double v) { return vdupq_n_f64(v); }
CG_HD uint32x4_t as_bits(float32x4_t v) { return vreinterpretq_u32_f32(v); }
CG_HD uint64x2_t as_bits(float64x2_t v) { return vreinterpretq_u64_f64(v); }
CG_HD float32x4_t as_numbers(uint32x4_t v) { return vreinterpretq_f32_u32(v); }
CG_HD float64x2_t as_numbers(uint64x2_t v) { return vreinterpretq_f64_u64(v); }

// All bits of a lane set, or none.
template <class A>
struct LaneMask {
  decltype(as_bits(broadcast(A()))) m;
  friend CG_HD LaneMask operator&(LaneMask a, LaneMask b) { return {a.m & b.m}; }
  friend CG_HD LaneMask operator|(LaneMask a, LaneMask b) { return {a.m | b.m}; }
  friend CG_HD LaneMask operator!(LaneMask a) { return {~a.m}; }
};

template <class A>
struct Vec {
  using scalar = A;
  using Mask = LaneMask<A>;
  using Register = decltype(broadcast(A()));
  using Bits = decltype(as_bits(broadcast(A())));
  static constexpr bool kFloat = std::is_same_v<A, float>;
  Register v;

  CG_HD Vec() = default;
  CG_HD Vec(Register from) : v(from) {}
  explicit CG_HD Vec(A from) : v(broadcast(from)) {}
  static CG_HD Vec of_bits(Bits from) { return as_numbers(from); }
  CG_HD Bits bits() const { return as_bits(v); }

  friend CG_HD Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend CG_HD Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend CG_HD Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend CG_HD Vec mul(Vec a, Vec b) { return a.v * b.v; }
  friend CG_HD Vec mul_add(Vec a, Vec b, Vec c) {
    if constexpr (kFloat) return vfmaq_f32(c.v, a.v, b.v);
    else return vfmaq_f64(c.v, a.v, b.v);
  }
  friend CG_HD Vec ceil(Vec a) {
    if constexpr (kFloat) return vrndpq_f32(a.v);
    else return vrndpq_f64(a.v);
  }
  friend CG_HD Vec floor(Vec a) {
    if constexpr (kFloat) return vrndmq_f32(a.v);
    else return vrndmq_f64(a.v);
  }

  friend CG_HD Mask operator<(Vec a, Vec b) { return b > a; }
  friend CG_HD Mask operator<=(Vec a, Vec b) {
    if constexpr (kFloat) return {vcleq_f32(a.v, b.v)};
    else return {vcleq_f64(a.v, b.v)};
  }
  friend CG_HD Mask operator>(Vec a, Vec b) {
    if constexpr (kFloat) return {vcgtq_f32(a.v, b.v)};
    else return {vcgtq_f64(a.v, b.v)};
  }
  friend CG_HD Mask operator!=(Vec a, Vec b) {
    if constexpr (kFloat) return !Mask{vceqq_f32(a.v, b.v)};
    else return !Mask{vceqq_f64(a.v, b.v)};
  }
  friend CG_HD Mask is_positive(Vec a) { return !(a <= Vec(A(0))); }  // as NaN is
  friend CG_HD Vec select(Mask m, Vec a, Vec b) {
    if constexpr (kFloat) return vbslq_f32(m.m, a.v, b.v);
    else return vbslq_f64(m.m, a.v, b.v);
  }
  // FMIN and FMAX have other ideas of NaN and of -0.
  friend CG_HD Vec min_of(Vec a, Vec b) { return select(a < b, a, b); }
  friend CG_HD Vec max_of(Vec a, Vec b) { return select(a > b, a, b); }

  friend CG_HD Vec shift_bits_left(Vec a, int count) {
    if constexpr (kFloat) return of_bits(vshlq_u32(a.bits(), vdupq_n_s32(count)));
    else return of_bits(vshlq_u64(a.bits(), vdupq_n_s64(count)));
  }
  friend CG_HD Vec times_pow2(Vec a, Vec shifted) { return of_bits(a.bits() + vshlq_n_u32(shifted.bits(), 23)); }
};
using Floats = Vec<float>;
using Doubles = Vec<double>;

// Newton's step squares the error, which is 2^-8 at first.
CG_HD Floats approximate_reciprocal(Floats d) {
  float32x4_t guess = vrecpeq_f32(d.v);
  guess = vmulq_f32(guess, vrecpsq_f32(d.v, guess));
  return vmulq_f32(guess, vrecpsq_f32(d.v, guess));
}

template <class V>
struct Lanes;
template <>
struct Lanes<Floats> {
  static constexpr int kCount = 4;
  static CG_HD uint32x4_t places() { return uint32x4_t{1, 2, 4, 8}; }
  static CG_HD uint64_t bits(LaneMask<float> m) { return vaddvq_u32(vandq_u32(m.m, places())); }
  static CG_HD LaneMask<float> mask(uint64_t bits) {
    return {vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), places())};
  }
  static CG_HD void store_codes(uint8_t* p, Floats code) {
    const uint16x4_t words = vmovn_u32(vcvtq_u32_f32(code.v));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    memcpy(p, &bytes, kCount);
  }
  static CG_HD Floats load_codes(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, sizeof(four));
    const uint16x8_t words = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
  }
  template <int kDistance>
  static CG_HD Floats exchange(Floats v) {
    if constexpr (kDistance == 2) return vextq_f32(v.v, v.v, 2);
    else return vrev64q_f32(v.v);
  }
  static CG_HD float sum(Floats v) { return vaddvq_f32(v.v); }
};
template <>
struct Lanes<Doubles> {
  static constexpr int kCount = 2;
  static CG_HD uint64x2_t places() { return uint64x2_t{1, 2}; }
  static CG_HD uint64_t bits(LaneMask<double> m) { return vaddvq_u64(vandq_u64(m.m, places())); }
  static CG_HD LaneMask<double> mask(uint64_t bits) { return {vtstq_u64(vdupq_n_u64(bits), places())}; }
  static CG_HD void store_codes(uint8_t* p, Doubles code) {
    p[0] = static_cast<uint8_t>(code.v[0]), p[1] = static_cast<uint8_t>(code.v[1]);
  }
  static CG_HD Doubles load_codes(const uint8_t* p) { return vcvtq_f64_u64(uint64x2_t{p[0], p[1]}); }
  template <int kDistance>
  static CG_HD Doubles exchange(Doubles v) {
    return vextq_f64(v.v, v.v, 1);
  }
  static CG_HD double sum(Doubles v) { return vaddvq_f64(v.v); }
};

CG_HD Floats keep_upper_half(uint32x4_t bits) { return Floats::of_bits(bits & 0xffff0000u); }

// The upper half of each 32-bit lane is the bfloat16; the lower half is arbitrary.
CG_HD uint32x4_t bf16_round_bits(Floats v) { return v.bits() + ((vshrq_n_u32(v.bits(), 16) & 1u) + 0x7fffu); }
CG_HD uint32x4_t bf16_round_or_quiet_bits(Floats v) {
  return vbslq_u32((v != v).m, v.bits() | 0x400000u, bf16_round_bits(v));
}

template <class T, class A>
CG_HD Vec<A> round_to(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16>) return keep_upper_half(bf16_round_or_quiet_bits(v));
  else if constexpr (std::is_same_v<T, f16>) return vcvt_f32_f16(vcvt_f16_f32(v.v));
  else return v;
}
template <class T, class A>
CG_HD Vec<A> round_level(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16>) return keep_upper_half(bf16_round_bits(v));
  else return round_to<T>(v);
}
// To bfloat16: a number 1.5 * 2^16 times as large as the power of two in v leaves 8 bits of their sum.
template <class T, class A>
CG_HD Vec<A> round_regular(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Floats power = Floats::of_bits(v.bits() & 0x7f800000u);
    return mul_add(power, Floats(-0x1.8p16f), mul_add(power, Floats(0x1.8p16f), v));
  } else {
    return round_to<T>(v);
  }
}
// Rounding that Io<T>::store leaves undone: it rounds to f16, and drops the lower half for bf16.
template <class T, class A>
CG_HD Vec<A> round_for_store(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16>) return Floats::of_bits(bf16_round_or_quiet_bits(v));
  else return v;
}

// There is no instruction for a store past the caches that helps: stream() is store().
template <class T>
struct Io {
  using V = Vec<compute_t<T>>;
  static CG_HD V load(const T* p) {
    if constexpr (std::is_same_v<T, bf16>) return Floats::of_bits(vshll_n_u16(neon::load<uint16x4_t>(p), 16));
    else if constexpr (std::is_same_v<T, f16>) return vcvt_f32_f16(neon::load<float16x4_t>(p));
    else return neon::load<typename V::Register>(p);
  }
  static CG_HD void store(T* p, V v) {
    if constexpr (std::is_same_v<T, bf16>) neon::store(p, vshrn_n_u32(v.bits(), 16));
    else if constexpr (std::is_same_v<T, f16>) neon::store(p, vcvt_f16_f32(v.v));
    else neon::store(p, v.v);
  }
  static CG_HD void stream(T* p, V v) { store(p, v); }
};

// A register of T as two vectors, and back. For bfloat16 these are the numbers in even and in odd places, in fewer
// instructions than the two halves take; no number may be a NaN that is no bfloat16, so that rounding carries none
// over. Without kTiesToEven bfloat16's ties go up in magnitude, in fewer instructions.
template <class T>
CG_HD Pair<Floats> split(uint16x8_t both) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32x4_t bits = vreinterpretq_u32_u16(both);
    return {Floats::of_bits(vshlq_n_u32(bits, 16)), keep_upper_half(bits)};
  } else {
    const float16x8_t halves = vreinterpretq_f16_u16(both);
    return {Floats(vcvt_f32_f16(vget_low_f16(halves))), Floats(vcvt_high_f32_f16(halves))};
  }
}
template <class T>
CG_HD uint16x8_t join_rounded(Pair<Floats> v) {  // of numbers of T, or with more bits below them
  return vreinterpretq_u16_u32(vsriq_n_u32(v.second.bits(), v.first.bits(), 16));
}
template <class T, bool kTiesToEven = true>
CG_HD uint16x8_t join(Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto rounded = [](Floats each) {
      return Floats::of_bits(kTiesToEven ? bf16_round_bits(each) : each.bits() + 0x8000u);
    };
    return join_rounded<bf16>({rounded(v.first), rounded(v.second)});
  } else {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.first.v), v.second.v));
  }
}

// Two vectors of numbers of T, in an order that load_pair and store_pair share; what is stored is rounded to T.
template <class T>
CG_HD auto load_pair(const T* p) {
  if constexpr (sizeof(T) == 2) return split<T>(load<uint16x8_t>(p));
  else return Pair{Io<T>::load(p), Io<T>::load(p + Lanes<Vec<compute_t<T>>>::kCount)};
}
template <class T, class A>
CG_HD void store_pair(T* p, Pair<Vec<A>> v, bool) {
  if constexpr (sizeof(T) == 2) store(p, join<T>(v));
  else Io<T>::store(p, v.first), Io<T>::store(p + Lanes<Vec<A>>::kCount, v.second);
}
// The same of numbers of T, with nothing to round; and codes in that order, to a byte each.
template <class T, class A>
CG_HD void store_rounded_pair(T* p, Pair<Vec<A>> v, bool stream) {
  if constexpr (std::is_same_v<T, bf16>) store(p, join_rounded<bf16>(v));
  else store_pair(p, v, stream);
}
template <class T, class A>
CG_HD void store_code_pair(uint8_t* p, Pair<Vec<A>> codes) {
  if constexpr (std::is_same_v<T, bf16>) {
    store(p, vmovn_u16(interleave(vcvtq_u32_f32(codes.first.v), vcvtq_u32_f32(codes.second.v))));
  } else {
    Lanes<Vec<A>>::store_codes(p, codes.first), Lanes<Vec<A>>::store_codes(p + Lanes<Vec<A>>::kCount, codes.second);
  }
}

// The magnitudes of a register of numbers of T, as integers.
template <class T>
constexpr bool kHasMagnitudes = sizeof(T) < 8;
template <class T>
struct Magnitudes {
  static constexpr int kCount = 16 / sizeof(T);
  std::conditional_t<sizeof(T) == 2, uint16x8_t, uint32x4_t> v;
  static CG_HD Magnitudes load(const T* p) {
    if constexpr (sizeof(T) == 2) return {neon::load<uint16x8_t>(p) & uint16_t{0x7fff}};
    else return {neon::load<uint32x4_t>(p) & 0x7fffffffu};
  }
  static CG_HD Magnitudes larger(Magnitudes a, Magnitudes b) {
    if constexpr (sizeof(T) == 2) return {vmaxq_u16(a.v, b.v)};
    else return {vmaxq_u32(a.v, b.v)};
  }
  CG_HD uint32_t largest() const {
    if constexpr (sizeof(T) == 2) return vmaxvq_u16(v);
    else return vmaxvq_u32(v);
  }
};

// The bisection runs one number at a time: alphas that are not regular are left to the scalar set.
constexpr bool kAnyAlpha = false;

// Not measured on any CPU: as many dependent chains as 32 registers hold, and no prefetch.
constexpr int kPrefetchBytes = 0, kChains = 2;

CG_HD void stream_fence() {}

}  // namespace cg::neon
