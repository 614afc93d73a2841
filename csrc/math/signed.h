// The signed staircase: x -> code -> level, for x of both signs. The one native definition of what every kernel
// computes.
//
//   levels      L[k] = round_to_dtype(k * alpha), k = -p..p, p = 2^(bits - 1) - 1
//   thresholds  T[k] = (L[k-1] + L[k]) / 2, k = 1-p..p
//   code        c = #{k : x > T[k]}, 0..2p
//   output      y = L[c - p]
//
// NaN has code p and output NaN. A dynamic alpha can be 0, where a group of x is, or NaN: then all codes are p, and all
// outputs 0 or NaN.
#pragma once

#include "staircase.h"

namespace cg {

constexpr CG_HD int signed_top(int bits) { return (1 << (bits - 1)) - 1; }

// k is never -0: nor is L[0].
template <class T, class F>
CG_HD F signed_level(F k, F alpha) {
  return round_level<T>(mul(k, alpha));
}

// T[k], k >= 1 - p.
template <class T, class F>
CG_HD F signed_threshold(F k, F alpha) {
  return mul(signed_level<T>(k - F(1), alpha) + signed_level<T>(k, alpha), F(0.5));
}

// Not L[-p] <= x <= L[p]. False for NaN.
template <class T, class F>
CG_HD auto signed_outside(F x, F alpha, F p) {
  const F top = signed_level<T>(p, alpha);
  return (x > top) | (x < F(0) - top);
}

// The dynamic alpha of a group: its largest magnitude / p, rounded up; NaN if that is not finite.
CG_HD bf16 signed_alpha(float largest, float p) {
  const uint32_t bits = bit_cast<uint32_t>(largest / p);
  constexpr uint32_t kInfinity = 0x7f800000u;
  // The low half is what bfloat16 lacks. A carry goes on into the exponent, and up to infinity.
  const uint32_t up = (bits & 0x7fffffffu) < kInfinity ? bits + 0xffffu : kInfinity;
  return {static_cast<uint16_t>(up < kInfinity ? up >> 16 : 0x7fc0u)};
}
CG_HD bf16 signed_alpha(double largest, double p) {
  const double exact = largest / p;
  float single = static_cast<float>(exact);
  if (single < exact) single = bit_cast<float>(bit_cast<uint32_t>(single) + 1);
  return signed_alpha(single, 1.0f);
}

// What takes the place of a dynamic alpha of 0 in `quantize_signed_of_group`: 0 has code p and output 0 for any other
// alpha.
constexpr float kAlphaOfZeros = 1.0f;

// v + kToInteger - kToInteger is v rounded to an integer, and never -0.
template <class A>
constexpr A kToInteger = 0x1.8p23f;
template <>
constexpr double kToInteger<double> = 0x1.8p52;

// A guess by one multiplication, settled by one comparison. Needs `regular` of alpha and p (staircase.h), and an x that
// is no NaN. T[k] is less than alpha / 2 away from (k - 1/2) * alpha, so that a guess in units of alpha, and of 1/2
// less than x, is right or one too low.
template <class F>
CG_HD F signed_guess(F x, F inverse) {
  const F to_integer(kToInteger<scalar_of<F>>);
  return (mul_add(x, inverse, F(-0.5)) + to_integer) - to_integer;
}
// Settled so, for any x.
template <class T, class F>
CG_HD Quantized<F> quantize_signed(F x, F alpha, F inverse, F p) {
  const F guess = max_of(min_of(signed_guess(x, inverse), p - F(1)), F(0) - p), next = guess + F(1);
  const F below = round_regular<T>(mul(guess, alpha)), above = round_regular<T>(mul(next, alpha));
  const auto raised = x > mul(below + above, F(0.5));
  return {select(x != x, p, select(raised, next, guess) + p), select(x != x, x, select(raised, above, below))};
}

// The levels of a dynamic alpha, if they are normal numbers of T. (2^16 + 1) v, in the 24 bits of a float, is 2^16 v
// and the leading 8 bits of v, rounded: those of bfloat16 (with 2^13 it is the 11 of float16). All else is exact, as
// alpha has 8 bits, and v = k * alpha at most 15. A difference of equals is never -0.
template <class T, class F>
struct LevelsOfGroup {
  static constexpr float kTimes = std::is_same_v<T, bf16> ? 0x1p16f : 0x1p13f;
  F more, less;
  explicit CG_HD LevelsOfGroup(F alpha) : more(mul(alpha, F(kTimes + 1))), less(mul(alpha, F(-kTimes))) {}
  CG_HD F at(F k) const { return mul_add(k, less, mul(k, more)); }
};
// Where all levels but 0 are normal numbers of T.
template <class T, class A>
CG_HD bool normal_levels(A alpha) {
  return !std::is_same_v<T, f16> || alpha >= A(0x1p-14f);
}

// The same for x of a group with a regular dynamic alpha of `normal_levels`: no NaN, and none above p * alpha. Of
// float32 and float64 no level is rounded.
template <class T, class F>
CG_HD Quantized<F> quantize_signed_of_group(F x, F alpha, F inverse, F p) {
  if constexpr (sizeof(T) == 2) {
    // Down to an integer, by one instruction of a vector. T[k] is more than a few ulps away from any k * alpha.
    F guess;
    if constexpr (std::is_arithmetic_v<F>) guess = signed_guess(x, inverse);
    else guess = floor(mul(x, inverse));
    const LevelsOfGroup<T, F> levels(alpha);
    const F next = guess + F(1), below = levels.at(guess), above = levels.at(next);
    const auto raised = x > mul(below + above, F(0.5));
    return {select(raised, next, guess) + p, select(raised, above, below)};
  } else {
    const F guess = signed_guess(x, inverse);
    const F k = select(x > mul(guess + F(0.5), alpha), guess + F(1), guess);
    return {k + p, mul(k, alpha)};
  }
}

// Bisection over the thresholds: for any alpha, 0 and NaN included, one number at a time.
template <class T, class A>
CG_HD Quantized<A> quantize_signed_any(A x, A alpha, A p) {
  if (x != x) return {p, x};
  if (!(alpha > A(0))) return {p, mul(A(0), alpha)};
  int low = 0, high = 2 * static_cast<int>(p);
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (x > signed_threshold<T>(A(middle) - p, alpha)) low = middle;
    else high = middle - 1;
  }
  return {A(low), signed_level<T>(A(low) - p, alpha)};
}

}  // namespace cg
