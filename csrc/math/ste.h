// The coarse gradients (straight-through estimators): dx = dy * g'(u), u = x / alpha.
//
// To add one: a line in CG_FOR_EACH_STE and a struct with
//   kNeeds  what the backward has to know of x
//   gate    where g' is not zero (true for NaN: a NaN's gradient passes); none if kNeeds is `nothing`
//   g       g' there; 1 for NaN
// Unless kNeeds is `x`, g' is 1 on the gate and the saved bit is the gate. cpu/generic/fast_slope.h may have a faster
// g.
#pragma once

#include "staircase.h"

namespace cg {

#define CG_FOR_EACH_STE(X)                   \
  X(identity, Identity)                      \
  X(relu, Relu)                              \
  X(clipped_relu, ClippedRelu)               \
  X(log_tailed_relu, LogTailedRelu)          \
  X(reverse_exponential, ReverseExponential) \
  X(trust, Trust)

enum class Ste {
#define CG_NAME(name, Struct) name,
  CG_FOR_EACH_STE(CG_NAME)
#undef CG_NAME
};

enum class Needs { nothing, positive, inside, near, x };

template <class F>
struct Point {
  F x, alpha, u, q, inverse_q, top;  // u = x / alpha, inverse_q = 1 / q, top = L[q]
};

template <class F>
CG_HD auto is_positive(F x) {
  return !(x <= F(0));
}
template <class F>
CG_HD auto is_inside(const Point<F>& p) {
  return !((p.x <= F(0)) | (p.x > p.top));
}
// Within half a stair of the range [0, top]; the sum is rounded once.
template <class F>
CG_HD auto is_near(F x, F alpha, F top) {
  const F half = mul(alpha, F(0.5));
  return !((x < F(0) - half) | (x > top + half));
}

// 2^n for an integer n in the exponent range: n + bias lands in the low bits of a number whose ulp is one.
template <class F>
CG_HD F pow2(F n) {
  if constexpr (sizeof(scalar_of<F>) == sizeof(float)) return shift_bits_left(n + F(0x1.8p23f + 127), 23);
  else return shift_bits_left(n + F(0x1.8p52 + 1023), 52);
}

// exp(-t) for t >= 0: t = n ln 2 + r, |r| <= ln(2)/2, Taylor in r. No fma, so that every CPU rounds alike; within
// 2 ulps in float32 and 3 in float64 down to the smallest subnormal (tests/cpp).
template <class F>
CG_HD F exp_minus(F t) {
  using A = scalar_of<F>;
  constexpr bool kSingle = sizeof(A) == sizeof(float);
  constexpr int kOrder = kSingle ? 7 : 13;
  constexpr A kMagic = kSingle ? A(0x1.8p23) : A(0x1.8p52);                           // rounds to an integer
  constexpr A kLn2High = kSingle ? A(0x1.62ep-1) : A(0x1.62e42feep-1);                // n * kLn2High is exact
  constexpr A kLn2Low = kSingle ? A(0x1.0bfbe8p-15) : A(0x1.a39ef35793c76p-33);
  constexpr A kUnderflow = kSingle ? A(104) : A(746);                                 // exp(-t) is 0 from here on
  const F bounded = select(t < F(kUnderflow), t, F(kUnderflow));
  const F n = (mul(bounded, F(A(1.4426950408889634))) + F(kMagic)) - F(kMagic);
  const F r = mul(n, F(kLn2Low)) - (bounded - mul(n, F(kLn2High)));
  A factorial = 1;
  for (int k = 2; k <= kOrder; ++k) factorial *= A(k);
  F sum = F(A(1) / factorial);
  for (int k = kOrder - 1; k >= 0; --k) {
    factorial /= A(k + 1);
    sum = mul(sum, r) + F(A(1) / factorial);
  }
  // In two factors, as 2^-n alone can be below the normal range.
  const F half = (mul(n, F(0.5)) + F(kMagic)) - F(kMagic);
  return mul(mul(sum, pow2(F(0) - half)), pow2(half - n));
}

// 1 / d for d >= 1.
template <class F>
CG_HD F one_over(F d) {
  return F(1) / d;
}

#if defined(__CUDA_ARCH__)
// By the GPU's approximate instructions, each within a few ulps: 2^-y, then a correction for the rounding of y = t /
// ln(2).
CG_HD float exp_minus(float t) {
  const float bounded = t < 104.f ? t : 104.f;
  const float y = __fmul_rn(bounded, 1.44269502f);
  const float rest = __fmaf_rn(bounded, 1.92596303e-8f, __fmaf_rn(bounded, 1.44269502f, -y));
  float power;
  asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(-y));
  return __fmaf_rn(power, __fmul_rn(rest, -0.693147182f), power);
}
// 0 from 2^126 on.
CG_HD float one_over(float d) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(d));
  return result;
}
#endif

struct Identity {
  static constexpr Needs kNeeds = Needs::nothing;
  template <class F>
  static CG_HD F g(const Point<F>&) {
    return F(1);
  }
};

struct Relu {
  static constexpr Needs kNeeds = Needs::positive;
  template <class F>
  static CG_HD auto gate(const Point<F>& p) {
    return is_positive(p.x);
  }
  template <class F>
  static CG_HD F g(const Point<F>&) {
    return F(1);
  }
};

struct ClippedRelu {
  static constexpr Needs kNeeds = Needs::inside;
  template <class F>
  static CG_HD auto gate(const Point<F>& p) {
    return is_inside(p);
  }
  template <class F>
  static CG_HD F g(const Point<F>&) {
    return F(1);
  }
};

// 1 up to u = q, then 1 / (u - q + 1).
struct LogTailedRelu {
  static constexpr Needs kNeeds = Needs::x;
  template <class F>
  static CG_HD auto gate(const Point<F>& p) {
    return is_positive(p.x);
  }
  template <class F>
  static CG_HD F g(const Point<F>& p) {
    return select(p.u > p.q, one_over((p.u - p.q) + F(1)), F(1));
  }
};

// exp(-u / q).
struct ReverseExponential {
  static constexpr Needs kNeeds = Needs::x;
  template <class F>
  static CG_HD auto gate(const Point<F>& p) {
    return is_positive(p.x);
  }
  template <class F>
  static CG_HD F g(const Point<F>& p) {
    return exp_minus(quotient(max_of(p.u, F(0)), p.q, p.inverse_q));
  }
};

struct Trust {
  static constexpr Needs kNeeds = Needs::near;
  template <class F>
  static CG_HD auto gate(const Point<F>& p) {
    return is_near(p.x, p.alpha, p.top);
  }
  template <class F>
  static CG_HD F g(const Point<F>&) {
    return F(1);
  }
};

// g'(u); 0 where the gate is shut.
template <class Ste, class F>
CG_HD F slope(const Point<F>& p) {
  const F g = Ste::g(p);
  if constexpr (Ste::kNeeds == Needs::nothing) return g;
  else return select(Ste::gate(p), g, F(0));
}

// v * slope. A slope of 0 is a select, never a product: inf * 0 must not arise.
template <class F>
CG_HD F times_slope(F v, F slope) {
  return select(slope != F(0), mul(v, slope), F(0));
}

}  // namespace cg
