// The staircase: x -> code -> level. The one native definition of what every kernel computes.
//
//   levels      L[k] = round_to_dtype(k * alpha), k = 0..q, q = 2^bits - 1
//   thresholds  ceil: T[k] = L[k-1];  nearest: T[k] = (L[k-1] + L[k]) / 2;  hwgq: nearest, but T[1] = 0
//   code        c = #{k in 1..q : x > T[k]}: treads are closed on the right
//   output      y = L[c]
//
// NaN has code q and output NaN.
#pragma once

#include "dtype.h"

namespace cg {

enum class Rounding { ceil, nearest, hwgq };

template <class T, class F>
CG_HD F level(F k, F alpha) {
  return round_level<T>(mul(k, alpha));
}

// T[k], k >= 1.
template <class T, Rounding R, class F>
CG_HD F threshold(F k, F alpha) {
  const F below = level<T>(k - F(1), alpha);
  if constexpr (R == Rounding::ceil) return below;
  const F middle = mul(below + level<T>(k, alpha), F(0.5));
  if constexpr (R == Rounding::hwgq) return select(k <= F(1), F(0), middle);
  return middle;
}

// The factor that converts x to units of alpha. Under ceil it is one ulp above the rounded reciprocal, so that the
// first guess of `quantize` is never too low.
template <class A>
CG_HD A reciprocal(A alpha, Rounding rounding) {
  const A inverse = A(1) / alpha;
  if (rounding != Rounding::ceil) return inverse;
  if constexpr (sizeof(A) == sizeof(double)) return bit_cast<A>(bit_cast<uint64_t>(inverse) + 1);
  else return bit_cast<A>(bit_cast<uint32_t>(inverse) + 1);
}

// Whether `quantize` may be used: levels are distinct in T, no sum of two overflows, and the reciprocal is normal.
template <class T, class A>
CG_HD bool regular(A alpha, A q) {
  return alpha >= Limits<T>::kMinStep && level<T>(q, alpha) <= Limits<T>::kMaxLevel;
}

template <class F>
struct Quantized {
  F code, y;
};

// Rounds u, in units of alpha, up to an integer in [1, q]; NaN to q.
template <class F>
CG_HD F up_to_code(F u, F q) {
  return max_of(ceil(min_of(u, q)), F(1));
}

// A guess by one multiplication, settled by comparing x, which is not NaN, with the thresholds next to it. Needs
// `regular`.
template <class T, Rounding R, class F>
CG_HD Quantized<F> quantize_number(F x, F alpha, F inverse, F q) {
  F code, y;
  if constexpr (R == Rounding::ceil) {
    // The guess is right or one too high. From 1 up, so that the same comparison (x <= L[0] = 0) settles x <= 0, and
    // a positive x whose product underflowed still gets code 1.
    const F guess = up_to_code(mul(x, inverse), q);
    const F below = level<T>(guess - F(1), alpha);
    const auto too_high = x <= below;
    code = select(too_high, guess - F(1), guess);
    y = select(too_high, below, level<T>(guess, alpha));
  } else {
    // The guess is within one of the code; from 1 up for the same reason. Under hwgq T[1] = 0.
    const F guess = up_to_code(mul(x, inverse) - F(0.5), q);
    const F next = guess + F(1);
    const F raised = select(next < q, next, q);
    code = select(x > threshold<T, R>(next, alpha), raised,
                  select(x <= threshold<T, R>(guess, alpha), guess - F(1), guess));
    y = level<T>(code, alpha);
  }
  return {code, y};
}

// The same for any x.
template <class T, Rounding R, class F>
CG_HD Quantized<F> quantize(F x, F alpha, F inverse, F q) {
  const Quantized<F> number = quantize_number<T, R>(x, alpha, inverse, q);
  return {number.code, select(x != x, x, number.y)};
}

// Bisection over the thresholds: for any alpha, one number at a time.
template <class T, Rounding R, class A>
CG_HD Quantized<A> quantize_any(A x, A alpha, A q) {
  if (x != x) return {q, x};
  int low = 0, high = static_cast<int>(q);
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (x > threshold<T, R>(A(middle), alpha)) low = middle;
    else high = middle - 1;
  }
  return {A(low), level<T>(A(low), alpha)};
}

}  // namespace cg
