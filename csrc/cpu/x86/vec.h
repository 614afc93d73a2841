// Floats or doubles in a register of either width, of registers.h. CG_MM(name) is the intrinsic of that width.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/registers.h"
#endif
#include "../generic/pair.h"

namespace cg::CG_ISA {

template <class A>
struct Vec {
  using scalar = A;
  using Mask = LaneMask<A>;
  FloatRegister<A> v;

  CG_HD Vec() = default;
  CG_HD Vec(FloatRegister<A> from) : v(from) {}
  explicit CG_HD Vec(A from) : v(broadcast(from)) {}
  static CG_HD Vec of_bits(Register from) { return reinterpret_cast<FloatRegister<A>>(from); }
  CG_HD Register bits() const { return reinterpret_cast<Register>(v); }

  friend CG_HD Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend CG_HD Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend CG_HD Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend CG_HD Vec mul(Vec a, Vec b) { return a.v * b.v; }
  friend CG_HD Vec mul_add(Vec a, Vec b, Vec c) {
    if constexpr (std::is_same_v<A, float>) return CG_MM(fmadd_ps)(a.v, b.v, c.v);
    else return CG_MM(fmadd_pd)(a.v, b.v, c.v);
  }
  friend CG_HD Vec ceil(Vec a) { return round_up(a.v); }
  friend CG_HD Vec floor(Vec a) { return round_down(a.v); }

  friend CG_HD Mask operator<(Vec a, Vec b) { return compare<_CMP_LT_OQ>(a.v, b.v); }
  friend CG_HD Mask operator<=(Vec a, Vec b) { return compare<_CMP_LE_OQ>(a.v, b.v); }
  friend CG_HD Mask operator>(Vec a, Vec b) { return compare<_CMP_GT_OQ>(a.v, b.v); }
  friend CG_HD Mask operator!=(Vec a, Vec b) { return compare<_CMP_NEQ_UQ>(a.v, b.v); }
  friend CG_HD Mask is_positive(Vec a) { return compare<_CMP_NLE_UQ>(a.v, FloatRegister<A>{}); }
  friend CG_HD Vec select(Mask m, Vec a, Vec b) { return blend(m, a.v, b.v); }
  friend CG_HD Vec min_of(Vec a, Vec b) {
    if constexpr (std::is_same_v<A, float>) return CG_MM(min_ps)(a.v, b.v);
    else return CG_MM(min_pd)(a.v, b.v);
  }
  friend CG_HD Vec max_of(Vec a, Vec b) {
    if constexpr (std::is_same_v<A, float>) return CG_MM(max_ps)(a.v, b.v);
    else return CG_MM(max_pd)(a.v, b.v);
  }

  friend CG_HD Vec shift_bits_left(Vec a, int count) {
    if constexpr (std::is_same_v<A, float>) return of_bits(CG_MM(slli_epi32)(a.bits(), count));
    else return of_bits(CG_MM(slli_epi64)(a.bits(), count));
  }
  friend CG_HD Vec times_pow2(Vec a, Vec shifted) {
    return of_bits(CG_MM(add_epi32)(a.bits(), CG_MM(slli_epi32)(shifted.bits(), 23)));
  }
};
using Floats = Vec<float>;
using Doubles = Vec<double>;

template <class V>
struct Lanes;

CG_HD Floats keep_upper_half(Register bits) {
  return Floats::of_bits(bits & CG_MM(set1_epi32)(static_cast<int>(0xffff0000u)));
}

// The upper half of each 32-bit lane is the bfloat16; the lower half is arbitrary.
CG_HD Register bf16_round_bits(Floats v) {
  const Register odd = CG_MM(srli_epi32)(v.bits(), 16) & CG_MM(set1_epi32)(1);
  return CG_MM(add_epi32)(v.bits(), CG_MM(add_epi32)(odd, CG_MM(set1_epi32)(0x7fff)));
}
CG_HD Register bf16_round_or_quiet_bits(Floats v) { return or_quiet_nan(bf16_round_bits(v), v.v); }

CG_HD HalfRegister f16_halves(Floats v) { return CG_MM(cvtps_ph)(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
CG_HD HalfRegister upper_halves(Register bits) { return narrow_lanes(CG_MM(srli_epi32)(bits, 16)); }

template <class T, class A>
CG_HD Vec<A> round_to(Vec<A> v) {
  if constexpr (std::is_same_v<T, bf16>) return keep_upper_half(bf16_round_or_quiet_bits(v));
  else if constexpr (std::is_same_v<T, f16>) return CG_MM(cvtph_ps)(f16_halves(v));
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
    const Floats power = Floats::of_bits(v.bits() & CG_MM(set1_epi32)(0x7f800000));
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

template <class T>
struct Io;
template <>
struct Io<float> {
  static CG_HD Floats load(const float* p) { return CG_MM(loadu_ps)(p); }
  static CG_HD void store(float* p, Floats v) { CG_MM(storeu_ps)(p, v.v); }
  static CG_HD void stream(float* p, Floats v) { CG_MM(stream_ps)(p, v.v); }
};
template <>
struct Io<double> {
  static CG_HD Doubles load(const double* p) { return CG_MM(loadu_pd)(p); }
  static CG_HD void store(double* p, Doubles v) { CG_MM(storeu_pd)(p, v.v); }
  static CG_HD void stream(double* p, Doubles v) { CG_MM(stream_pd)(p, v.v); }
};
template <>
struct Io<bf16> {
  static CG_HD Floats load(const bf16* p) {
    return Floats::of_bits(CG_MM(slli_epi32)(CG_MM(cvtepu16_epi32)(load_half(p)), 16));
  }
  static CG_HD void store(bf16* p, Floats v) { store_half(p, upper_halves(v.bits())); }
  static CG_HD void stream(bf16* p, Floats v) { stream_half(p, upper_halves(v.bits())); }
};
template <>
struct Io<f16> {
  static CG_HD Floats load(const f16* p) { return CG_MM(cvtph_ps)(load_half(p)); }
  static CG_HD void store(f16* p, Floats v) { store_half(p, f16_halves(v)); }
  static CG_HD void stream(f16* p, Floats v) { stream_half(p, f16_halves(v)); }
};

// A register of T as two vectors, and back. For bfloat16 these are the numbers in even and in odd places, in fewer
// instructions than the two halves take; no number may be a NaN that is no bfloat16, so that rounding carries none
// over. Without kTiesToEven bfloat16's ties go up in magnitude, in a quarter of the instructions.
template <class T>
CG_HD Pair<Floats> split(Register both) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {Floats::of_bits(CG_MM(slli_epi32)(both, 16)), keep_upper_half(both)};
  } else {
    return {CG_MM(cvtph_ps)(low_half(both)), CG_MM(cvtph_ps)(high_half(both))};
  }
}
template <class T, bool kTiesToEven = true>
CG_HD Register join(Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto rounded = [](Floats each) {
      if constexpr (kTiesToEven) return bf16_round_bits(each);
      else return CG_MM(add_epi32)(each.bits(), CG_MM(set1_epi32)(0x8000));
    };
    return blend_odd(CG_MM(srli_epi32)(rounded(v.first), 16), rounded(v.second));
  } else {
    return join_halves(f16_halves(v.first), f16_halves(v.second));
  }
}
// Two vectors of numbers of T, in an order that load_pair and store_pair share; what is stored is rounded to T.
template <class T>
CG_HD auto load_pair(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) return split<bf16>(load_register(p));
  else return Pair{Io<T>::load(p), Io<T>::load(p + Lanes<Vec<compute_t<T>>>::kCount)};
}
template <class T, class A>
CG_HD void store_pair(T* p, Pair<Vec<A>> v, bool stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (stream) stream_register(p, join<bf16>(v));
    else store_register(p, join<bf16>(v));
  } else {
    T* const q = p + Lanes<Vec<A>>::kCount;
    if (stream) Io<T>::stream(p, v.first), Io<T>::stream(q, v.second);
    else Io<T>::store(p, v.first), Io<T>::store(q, v.second);
  }
}

// The same of numbers of T, with nothing to round; and codes in that order, to a byte each.
template <class T, class A>
CG_HD void store_rounded_pair(T* p, Pair<Vec<A>> v, bool stream) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Register both = blend_odd(CG_MM(srli_epi32)(v.first.bits(), 16), v.second.bits());
    if (stream) stream_register(p, both);
    else store_register(p, both);
  } else {
    store_pair(p, v, stream);
  }
}
template <class T, class A>
CG_HD void store_code_pair(uint8_t* p, Pair<Vec<A>> codes) {
  if constexpr (std::is_same_v<T, bf16>) {
    const Register odd = CG_MM(slli_epi32)(CG_MM(cvtps_epi32)(codes.second.v), 16);
    store_bytes_of_words(p, CG_MM(cvtps_epi32)(codes.first.v) | odd);
  } else {
    Lanes<Vec<A>>::store_codes(p, codes.first), Lanes<Vec<A>>::store_codes(p + Lanes<Vec<A>>::kCount, codes.second);
  }
}

// The magnitudes of a register of numbers of T, as integers.
template <class T>
constexpr bool kHasMagnitudes = sizeof(T) < 8;
template <class T>
struct Magnitudes {
  static constexpr int kCount = sizeof(Register) / sizeof(T);
  Register v;
  static CG_HD Magnitudes load(const T* p) {
    if constexpr (sizeof(T) == 2) return {load_register(p) & CG_MM(set1_epi16)(0x7fff)};
    else return {load_register(p) & CG_MM(set1_epi32)(0x7fffffff)};
  }
  static CG_HD Magnitudes larger(Magnitudes a, Magnitudes b) {
    if constexpr (sizeof(T) == 2) return {CG_MM(max_epi16)(a.v, b.v)};
    else return {CG_MM(max_epi32)(a.v, b.v)};
  }
  CG_HD uint32_t largest() const {
    const __m128i most = largest_quarter<sizeof(T)>(v);
    if constexpr (sizeof(T) == 2) {
      const __m128i all = _mm_set1_epi16(-1);
      return 0xffffu ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(most, all))) & 0xffffu);
    } else {
      const __m128i two = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
      return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
  }
};

// The bisection runs one number at a time: alphas that are not regular are left to the scalar set.
constexpr bool kAnyAlpha = false;

// Streamed stores are weakly ordered: fence before another thread may read.
CG_HD void stream_fence() { _mm_sfence(); }

}  // namespace cg::CG_ISA
