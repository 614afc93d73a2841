// The operations that the formulas of this folder ask of a number type F: of float and double here, of vectors in
// csrc/cpu/*/vec.h. So every formula is written once and instantiated per device and instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CG_HD __host__ __device__ __forceinline__
#else
// Always inline: a copy left out of line by one instruction set's file could be linked into another's.
#define CG_HD inline __attribute__((always_inline))
#endif

namespace cg {

// Products that decide a code are rounded once: never contracted into an fma, whatever the compiler's default.
CG_HD float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
CG_HD double mul(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// a * b + c for approximations: rounded once where there is an fma, as vectors have, or twice.
CG_HD float mul_add(float a, float b, float c) { return mul(a, b) + c; }
CG_HD double mul_add(double a, double b, double c) { return mul(a, b) + c; }

// a / b, given 1 / b within two ulps. On a GPU it avoids division, which is a call there, and may be off by an ulp.
template <class F>
CG_HD F quotient(F a, F b, F) {
  return a / b;
}
#if defined(__CUDA_ARCH__)
CG_HD float quotient(float a, float b, float inverse) {
  const float guess = __fmul_rn(a, inverse);
  const float settled = __fmaf_rn(__fmaf_rn(-guess, b, a), inverse, guess);
  return guess < 0x1p126f ? settled : guess;  // infinity and NaN stay
}
#endif

CG_HD float select(bool m, float a, float b) { return m ? a : b; }
CG_HD double select(bool m, double a, double b) { return m ? a : b; }
// b where a is NaN.
template <class F>
CG_HD F min_of(F a, F b) {
  return select(a < b, a, b);
}
template <class F>
CG_HD F max_of(F a, F b) {
  return select(a > b, a, b);
}
CG_HD float ceil(float a) { return ::ceilf(a); }
CG_HD double ceil(double a) { return ::ceil(a); }

template <class To, class From>
CG_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Shifts the bits of the number up by `count`: pow2 puts an integer into the exponent field so.
CG_HD float shift_bits_left(float a, int count) { return bit_cast<float>(bit_cast<uint32_t>(a) << count); }
CG_HD double shift_bits_left(double a, int count) { return bit_cast<double>(bit_cast<uint64_t>(a) << count); }

// The scalar type of F: float for float and its vectors, double likewise.
template <class F>
struct ScalarOf {
  using type = typename F::scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class F>
using scalar_of = typename ScalarOf<F>::type;

}  // namespace cg
