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

// What takes the place of a dynamic alpha of 0 in `quantize_signed`: 0 has code p and output 0 for any other alpha.
constexpr float kAlphaOfZeros = 1.0f;

// v + kToInteger - kToInteger is v rounded to an integer, and never -0.
template <class A>
constexpr A kToInteger = 0x1.8p23f;
template <>
constexpr double kToInteger<double> = 0x1.8p52;

// A guess by one multiplication, settled by one comparison. Needs `regular` of alpha and p (staircase.h), and an x that
// is no NaN. T[k] is less than alpha / 2 away from (k - 1/2) * alpha, so that a guess in units of alpha, and of 1/2
// less than x, is right or one too low.
template <class T, class F>
CG_HD Quantized<F> quantize_signed_number(F x, F alpha, F inverse, F p) {
  const F to_integer(kToInteger<scalar_of<F>>);
  const F nearest = ((mul(x, inverse) - F(0.5)) + to_integer) - to_integer;
  const F guess = max_of(min_of(nearest, p - F(1)), F(0) - p), next = guess + F(1);
  const F below = signed_level<T>(guess, alpha), above = signed_level<T>(next, alpha);
  const auto raised = x > mul(below + above, F(0.5));
  return {select(raised, next, guess) + p, select(raised, above, below)};
}

// The same for any x.
template <class T, class F>
CG_HD Quantized<F> quantize_signed(F x, F alpha, F inverse, F p) {
  const Quantized<F> number = quantize_signed_number<T>(x, alpha, inverse, p);
  return {select(x != x, p, number.code), select(x != x, x, number.y)};
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
