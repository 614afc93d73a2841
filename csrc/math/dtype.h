// The four storage types, the type each is computed in, and rounding to a storage type (to nearest, ties to even).
#pragma once

#include <type_traits>

#include "macros.h"

namespace cg {

enum class Dtype { float32, float64, bfloat16, float16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// float64 is computed in float64, all else in float32.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

// The range of alpha and of the top level in which a staircase is regular; see staircase.h.
template <class T>
struct Limits {
  static constexpr float kMinStep = 0x1p-126f, kMaxLevel = 0x1p126f;
};
template <>
struct Limits<f16> {
  static constexpr float kMinStep = 0x1p-24f, kMaxLevel = 65504.0f;
};
template <>
struct Limits<double> {
  static constexpr double kMinStep = 0x1p-1022, kMaxLevel = 0x1p1022;
};

// On a GPU these are instructions of its own: bit-exact except for NaN payloads.
CG_HD float to_float(float a) { return a; }
CG_HD float to_float(bf16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }
CG_HD bf16 to_bf16(float a) {
#if defined(__CUDA_ARCH__)
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(a));
  return rounded;
#else
  const uint32_t u = bit_cast<uint32_t>(a);
  if (a != a) return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // quiet, sign and payload kept
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

CG_HD float to_float(f16 a) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(a.bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16;
  const uint32_t exponent = a.bits & 0x7c00u, mantissa = a.bits & 0x3ffu;
  if (exponent == 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
  }
  return bit_cast<float>(sign | ((static_cast<uint32_t>(a.bits & 0x7fffu) << 13) + (112u << 23)));
#endif
}
CG_HD f16 to_f16(float a) {
#if defined(__CUDA_ARCH__)
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(a));
  return rounded;
#else
  const uint32_t u = bit_cast<uint32_t>(a);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: one ulp of 0.5 is one unit of the result
    h = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    h = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | h)};
#endif
}

// round_to<T>(v): the nearest number of T, as a number of the compute type. round_level<T>(v) is the same for v that is
// not NaN, which costs vectors less.
template <class T>
CG_HD compute_t<T> round_to(compute_t<T> v) {
  return v;
}
template <>
CG_HD float round_to<bf16>(float v) {
  return to_float(to_bf16(v));
}
template <>
CG_HD float round_to<f16>(float v) {
  return to_float(to_f16(v));
}
template <class T>
CG_HD compute_t<T> round_level(compute_t<T> v) {
  return round_to<T>(v);
}

// Compare keys: numbers of T in a form that compares fast. A float is its own key. The key of a 16-bit number that is
// not NaN is its bits as a signed integer: in order from 0 up, and negative below 0. So for v >= 0, x > v is key(x) >
// compare_key_floor<T>(v), the key of the largest number of T that is at most v. Magnitudes above kInfinityBits are
// NaNs.
template <class T>
using compare_key_t = std::conditional_t<sizeof(T) == 2, int16_t, compute_t<T>>;
template <class T>
compare_key_t<T> compare_key_floor(float v) = delete;
template <>
CG_HD float compare_key_floor<float>(float v) {
  return v;
}
template <>
CG_HD int16_t compare_key_floor<bf16>(float v) {
  return static_cast<int16_t>(bit_cast<uint32_t>(v) >> 16);
}
template <>
CG_HD int16_t compare_key_floor<f16>(float v) {
  const f16 nearest = to_f16(v);
  return static_cast<int16_t>(nearest.bits - (to_float(nearest) > v ? 1 : 0));
}
template <class T>
constexpr int16_t kInfinityBits = 0x7f80;
template <>
constexpr int16_t kInfinityBits<f16> = 0x7c00;

}  // namespace cg
