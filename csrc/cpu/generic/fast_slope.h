// Coarse gradients in fewer instructions, for vectors with an fma.
//   g_at       g' on the gate; kApproximate: for gradients in 16 bits, within 2^-13 of itself
//   FastSlope  g' for one regular alpha and x in (0, most], for the types that kFastSlope names
// Both are optional for an STE.
#pragma once

#include "../../math/ste.h"

namespace cg {

// a * 2^n, where n is the integer in the low bits of `shifted` and the result is in the normal range.
CG_HD float times_pow2(float a, float shifted) {
  return bit_cast<float>(bit_cast<uint32_t>(a) + (bit_cast<uint32_t>(shifted) << 23));
}

// 2^(a b) for a b in [-126, 0], within 2^-13 of itself, a fifth of a float16's ulp: a cubic that is 1 at 0 and of least
// relative error on [-1/2, 1/2].
template <class F>
CG_HD F approximate_exp2(F a, F b) {
  const F magic = F(0x1.8p23f), shifted = mul_add(a, b, magic), r = mul_add(a, b, magic - shifted);
  const F cubic = mul_add(mul_add(F(0x1.c2a168p-5f), r, F(0x1.f00c54p-3f)), r, F(0x1.62f5fcp-1f));
  return times_pow2(mul_add(cubic, r, F(1)), shifted);
}

// 2^-y for any y >= 0, with the same error. Below 2^-126 it is 2^-126, and 0 from y = 150 on.
template <class F>
CG_HD F approximate_exp2_minus(F y) {
  return select(y < F(150), approximate_exp2(min_of(y, F(126)), F(-1)), F(0));
}

// 1 / d for d in [1, 2^100], within 2^-20 of itself.
CG_HD float approximate_reciprocal(float d) { return 1 / d; }

// 2^(a (b + c)) for a b in [-126, 0], within an ulp or two; c is the part of b that a float cannot hold. The polynomial
// is 1 at 0 and of least relative error on [-1/2, 1/2] (2^-26). Needs a true fma: a b must not be rounded.
template <class F>
CG_HD F exp2_of_product(F a, F b, F c) {
  const F magic = F(0x1.8p23f), shifted = mul_add(a, b, magic);
  const F r = mul_add(a, c, mul_add(a, b, magic - shifted));
  constexpr float kRest[] = {0x1.5f3e58p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e43p-1f, 1};
  F sum = F(0x1.41fbc8p-13f);
  for (const float each : kRest) sum = mul_add(sum, r, F(each));
  return times_pow2(sum, shifted);
}

// a / b rounded once, but for some a / b that are within 2^-20 ulps of halfway between two floats, from 1 / b and its
// rounding error (Brisebarre, Muller and Raina 2004). Needs a true fma too.
struct Reciprocal {
  float rounded, rest;
  explicit Reciprocal(float b)
      : rounded(1 / b), rest(static_cast<float>(1 / static_cast<double>(b) - static_cast<double>(rounded))) {}
};
template <class F>
CG_HD F divided_by(F a, F inverse, F rest) {
  return mul_add(a, inverse, mul(a, rest));
}

template <class Ste, bool kApproximate, class F>
CG_HD F g_at(const Point<F>& p) {
  if constexpr (kApproximate && std::is_same_v<Ste, ReverseExponential>) {
    return approximate_exp2_minus(mul(max_of(p.u, F(0)), mul(p.inverse_q, F(1.44269504f))));
  } else {
    return Ste::g(p);
  }
}

template <class Ste, class T>
constexpr bool kFastSlope = false;
template <class Ste, class T, class F>
struct FastSlope;

template <class T>
constexpr bool kFastSlope<LogTailedRelu, T> = sizeof(T) == 2;
template <class T, class F>
struct FastSlope<LogTailedRelu, T, F> {
  F inverse, rest;
  explicit FastSlope(float alpha, float q) : inverse(1 / alpha), rest(1 - q) {}
  static float most(float alpha, float) { return mul(0x1p99f, alpha); }
  CG_HD F at(F x) const { return approximate_reciprocal(max_of(mul_add(x, inverse, rest), F(1))); }
};

template <class T>
constexpr bool kFastSlope<ReverseExponential, T> = sizeof(T) <= 4;
template <class T, class F>
struct FastSlope<ReverseExponential, T, F> {
  F factor, of_alpha, of_alpha_rest, of_q, of_q_rest;
  static constexpr float kLog2E = 0x1.715476p0f, kRest = 0x1.4ae0cp-26f;
  explicit FastSlope(float alpha, float q)
      : factor(-kLog2E / mul(alpha, q)),
        of_alpha(Reciprocal(alpha).rounded),
        of_alpha_rest(Reciprocal(alpha).rest),
        of_q(Reciprocal(q).rounded),
        of_q_rest(Reciprocal(q).rest) {}
  static float most(float alpha, float q) { return mul(mul(alpha, q), 125 / kLog2E); }
  CG_HD F at(F x) const {
    if constexpr (sizeof(T) == 2) {
      return approximate_exp2(x, factor);
    } else {
      // u and u / q are rounded as `g` rounds them: a large exponent turns an ulp of either into many.
      const F u_over_q = divided_by(divided_by(x, of_alpha, of_alpha_rest), of_q, of_q_rest);
      return exp2_of_product(u_over_q, F(-kLog2E), F(-kRest));
    }
  }
};

}  // namespace cg
