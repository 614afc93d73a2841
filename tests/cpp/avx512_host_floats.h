// The AVX-512 instructions of csrc/cpu's kernels over elements, as avx512_host.h has those of layers on codes.
#pragma once

#include "avx512_host.h"

#include <cmath>
#include <limits>

#undef __mmask32
#undef __mmask64
#define __mmask8 uint8_t
#define __mmask32 uint32_t

namespace host {

using F512 = float __attribute__((vector_size(64)));
using D512 = double __attribute__((vector_size(64)));
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, F512, D512>;
using R128 = __m128i;

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
template <class T, class R, class F>
R zipped(R a, R b, F f) {
  const Numbers<T, R> x(a), y(b);
  return each<T, R>([&](int i) { return static_cast<T>(f(x.v[i], y.v[i])); });
}
// A bit for each element that f holds for.
template <class T, class R, class F>
uint64_t bits_of(R a, R b, F f) {
  const Numbers<T, R> x(a), y(b);
  uint64_t bits = 0;
  for (int i = 0; i < x.kCount; ++i) bits |= static_cast<uint64_t>(f(x.v[i], y.v[i])) << i;
  return bits;
}
template <class T, class R>
R picked(uint64_t bits, R where, R otherwise) {
  const Numbers<T, R> x(where), y(otherwise);
  return each<T, R>([&](int i) { return bits >> i & 1 ? x.v[i] : y.v[i]; });
}
template <class T, class R>
R loaded_where(uint64_t bits, const void* p) {
  const T* from = static_cast<const T*>(p);
  return each<T, R>([&](int i) { return bits >> i & 1 ? from[i] : T(); });
}
// Of the first elements of From as many as R has of To.
template <class From, class To, class R, class S>
R converted(S from) {
  const Numbers<From, S> x(from);
  return each<To, R>([&](int i) { return static_cast<To>(x.v[i]); });
}
template <class T, int kPredicate>
bool holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (kPredicate & 15) {
    case _CMP_EQ_OQ: return a == b;
    case _CMP_LT_OS & 15: return a < b;
    case _CMP_LE_OS & 15: return a <= b;
    case _CMP_UNORD_Q: return unordered;
    case _CMP_NEQ_UQ: return !(a == b);
    case _CMP_NLT_US & 15: return !(a < b);
    case _CMP_NLE_US & 15: return !(a <= b);
    case _CMP_ORD_Q: return !unordered;
    case _CMP_EQ_UQ: return a == b || unordered;
    case _CMP_NGE_US & 15: return !(a >= b);
    case _CMP_NGT_US & 15: return !(a > b);
    case _CMP_NEQ_OQ: return a != b && !unordered;
    case _CMP_GE_OS & 15: return a >= b;
    case _CMP_GT_OS & 15: return a > b;
    default: std::abort();
  }
}
template <class T, int kPredicate>
uint64_t compared(Wide<T> a, Wide<T> b) {
  return bits_of<T>(a, b, [](T x, T y) { return holds<T, kPredicate>(x, y); });
}
// To the nearest even integer; the least one for what does not fit.
template <class I, class T>
I to_integer(T v) {
  const T nearest = std::nearbyint(v), limit = -static_cast<T>(std::numeric_limits<I>::min());
  return nearest >= -limit && nearest < limit ? static_cast<I>(nearest) : std::numeric_limits<I>::min();
}
template <class T, int kControl>
Wide<T> rounded(Wide<T> v) {
  static_assert((kControl & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_POS_INF ||
                (kControl & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEG_INF);
  return zipped<T>(v, v, [](T x, T) { return kControl & _MM_FROUND_TO_POS_INF ? std::ceil(x) : std::floor(x); });
}
// The upper half added to the lower one, again and again.
template <class T>
T total(Wide<T> v) {
  Numbers<T, Wide<T>> n(v);
  for (int half = n.kCount / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) n.v[i] += n.v[i + half];
  }
  return n.v[0];
}
// Quarters of 128 bits, two of each operand.
template <class R>
R shuffled_quarters(R a, R b, int control) {
  return cast<R>(host_shuffle_lanes(cast<R512>(a), cast<R512>(b), control));
}
template <class T>
R512 looked_up(R512 index, const R512* table, int count) {
  const int entries = 64 / static_cast<int>(sizeof(T));
  const Numbers<T, R512> x(index);
  return each<T, R512>([&](int i) {
    const int at = x.v[i] & (count * entries - 1);
    T value;
    memcpy(&value, reinterpret_cast<const char*>(table) + at * sizeof(T), sizeof(T));
    return value;
  });
}
inline R512 with_quarter(R512 v, R128 quarter, int at) {
  memcpy(reinterpret_cast<char*>(&v) + 16 * at, &quarter, 16);
  return v;
}
inline F512 of_halves(__m256i v) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(v)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  F512 to;
  memcpy(&to, &low, 32), memcpy(reinterpret_cast<char*>(&to) + 32, &high, 32);
  return to;
}
inline __m256i to_halves(F512 v) {
  __m256 low, high;
  memcpy(&low, &v, 32), memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
  return _mm256_set_m128i(_mm256_cvtps_ph(high, 0), _mm256_cvtps_ph(low, 0));
}
// With an error as large as the instruction may have.
inline float reciprocal_of_14_bits(float v) {
  const float exact = 1 / v;
  uint32_t bits = cast<uint32_t>(exact);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits &= ~0x1ffu;
  return cast<float>(bits);
}
template <class T>
Wide<T> fused(Wide<T> a, Wide<T> b, Wide<T> c, T sign) {
  const Numbers<T, Wide<T>> x(a), y(b), z(c);
  return each<T, Wide<T>>([&](int i) { return std::fma(sign * x.v[i], y.v[i], z.v[i]); });
}
template <class T>
Wide<T> gathered(const T* from, const int32_t* index) {
  return each<T, Wide<T>>([&](int i) { return from[index[i]]; });
}

}  // namespace host

#define __m512 host::F512
#define __m512d host::D512

// Loads, stores, casts.
#define _mm512_loadu_ps(p) host::cast<host::F512>(host_load(p))
#define _mm512_loadu_pd(p) host::cast<host::D512>(host_load(p))
#define _mm512_storeu_ps(p, v) host_store(p, v)
#define _mm512_storeu_pd(p, v) host_store(p, v)
#define _mm512_stream_ps(p, v) host_stream(p, v)
#define _mm512_stream_pd(p, v) host_stream(p, v)
#define _mm512_stream_si512(p, v) host_stream(p, v)
template <class R>
void host_stream(void* p, R v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) std::abort();  // as the instruction does
  memcpy(p, &v, 64);
}
#define _mm512_castps_si512(v) host::cast<host::R512>(v)
#define _mm512_castpd_si512(v) host::cast<host::R512>(v)
#define _mm512_castsi512_ps(v) host::cast<host::F512>(v)
#define _mm512_castsi512_pd(v) host::cast<host::D512>(v)
#define _mm512_castsi128_si512(v) host::with_quarter(host::R512{}, v, 0)
#define _mm512_inserti32x4(v, quarter, at) host::with_quarter(v, quarter, at)
#define _mm512_set1_ps(n) (host::F512{} + static_cast<float>(n))
#define _mm512_set1_pd(n) (host::D512{} + static_cast<double>(n))
#define _mm512_and_si512(a, b) ((a) & (b))

// Masks.
#define _mm512_cmp_ps_mask(a, b, predicate) static_cast<uint16_t>(host::compared<float, (predicate)>(a, b))
#define _mm512_cmp_pd_mask(a, b, predicate) static_cast<uint8_t>(host::compared<double, (predicate)>(a, b))
#define _mm512_mask_cmp_ps_mask(m, a, b, predicate) static_cast<uint16_t>((m) & _mm512_cmp_ps_mask(a, b, predicate))
#define HOST_COMPARE(type, a, b, op) host::bits_of<type>(a, b, [](type x, type y) { return x op y; })
#define _mm512_cmpgt_epi16_mask(a, b) static_cast<uint32_t>(HOST_COMPARE(int16_t, a, b, >))
#define _mm512_cmpgt_epu16_mask(a, b) static_cast<uint32_t>(HOST_COMPARE(uint16_t, a, b, >))
#define _mm512_cmpgt_epi32_mask(a, b) static_cast<uint16_t>(HOST_COMPARE(int32_t, a, b, >))
#define _mm512_mask_cmple_epi16_mask(m, a, b) static_cast<uint32_t>((m) & HOST_COMPARE(int16_t, a, b, <=))
#define HOST_TEST(type, a, b) host::bits_of<type>(a, b, [](type x, type y) { return (x & y) != 0; })
#define _mm512_test_epi8_mask(a, b) HOST_TEST(uint8_t, a, b)
#define _mm512_test_epi16_mask(a, b) static_cast<uint32_t>(HOST_TEST(uint16_t, a, b))
#undef _mm256_test_epi8_mask
#define _mm256_test_epi8_mask(a, b) static_cast<uint32_t>(HOST_TEST(uint8_t, a, b))
#define _mm512_mask_blend_epi16(m, a, b) host::picked<uint16_t>(m, b, a)
#define _mm512_mask_blend_ps(m, a, b) host::picked<float>(m, b, a)
#define _mm512_mask_blend_pd(m, a, b) host::picked<double>(m, b, a)
#define _mm512_maskz_mov_ps(m, a) host::picked<float>(m, a, host::F512{})
#define _mm512_maskz_mov_epi16(m, a) host::picked<uint16_t>(m, a, host::R512{})
#define _mm512_maskz_set1_epi8(m, n) host::picked<uint8_t>(m, _mm512_set1_epi8(n), host::R512{})
#define _mm512_mask_or_epi32(from, m, a, b) host::picked<uint32_t>(m, (a) | (b), from)
#define _mm512_mask_add_epi16(from, m, a, b) host::picked<uint16_t>(m, host_add<int16_t>(a, b), from)
#define _mm512_mask_add_epi32(from, m, a, b) host::picked<uint32_t>(m, host_add<int32_t>(a, b), from)
#define _mm512_maskz_loadu_epi16(m, p) host::loaded_where<uint16_t, host::R512>(m, p)
#undef _mm512_maskz_loadu_epi32
#define _mm512_maskz_loadu_epi32(m, p) host::loaded_where<uint32_t, host::R512>(m, p)
#define _mm512_maskz_loadu_epi64(m, p) host::loaded_where<uint64_t, host::R512>(m, p)
#define _mm512_maskz_loadu_ps(m, p) host::loaded_where<float, host::F512>(m, p)

// Integers.
#define _mm512_slli_epi32(v, n) host_map<uint32_t>(v, [&](uint32_t each) { return each << (n); })
#define _mm512_srli_epi32(v, n) host_map<uint32_t>(v, [&](uint32_t each) { return each >> (n); })
#define _mm512_slli_epi64(v, n) host_map<uint64_t>(v, [&](uint64_t each) { return each << (n); })
#define HOST_ZIP(type, a, b, result) host::zipped<type>(a, b, [](type x, type y) { return result; })
#define _mm512_max_epi16(a, b) HOST_ZIP(int16_t, a, b, std::max(x, y))
#define _mm512_max_epi32(a, b) HOST_ZIP(int32_t, a, b, std::max(x, y))
#define _mm512_min_epu16(a, b) HOST_ZIP(uint16_t, a, b, std::min(x, y))
#define _mm512_mulhi_epu16(a, b) HOST_ZIP(uint16_t, a, b, (uint32_t{x} * y) >> 16)
#define _mm512_adds_epu16(a, b) HOST_ZIP(uint16_t, a, b, std::min(0xffff, x + y))

// Conversions.
#define _mm512_cvtepu8_epi32(v) host::converted<uint8_t, int32_t, host::R512>(v)
#define _mm512_cvtepu8_epi64(v) host::converted<uint8_t, int64_t, host::R512>(v)
#define _mm512_cvtepu16_epi32(v) host::converted<uint16_t, int32_t, host::R512>(v)
#define _mm512_cvtepi16_epi8(v) host::converted<int16_t, int8_t, __m256i>(v)
#define _mm512_cvtepi32_epi16(v) host::converted<int32_t, int16_t, __m256i>(v)
#define _mm512_cvtepi32_epi8(v) host::converted<int32_t, int8_t, host::R128>(v)
#define _mm512_cvtepi64_epi8(v) host_eight_bytes(v)
inline host::R128 host_eight_bytes(host::R512 v) {
  const host::Numbers<int64_t, host::R512> n(v);
  return host::each<int8_t, host::R128>([&](int i) { return static_cast<int8_t>(i < 8 ? n.v[i] : 0); });
}
#define _mm512_cvtepi32_ps(v) host::converted<int32_t, float, host::F512>(v)
#define _mm512_cvtepi64_pd(v) host::converted<int64_t, double, host::D512>(v)
#define _mm512_cvtps_epi32(v) host_to_integers<int32_t, float>(v)
#define _mm512_cvtpd_epi64(v) host_to_integers<int64_t, double>(v)
template <class I, class T>
host::R512 host_to_integers(host::Wide<T> v) {
  const host::Numbers<T, host::Wide<T>> n(v);
  return host::each<I, host::R512>([&](int i) { return host::to_integer<I>(n.v[i]); });
}
#define _mm512_cvtph_ps(v) host::of_halves(v)
#define _mm512_cvtps_ph(v, rounding) host::to_halves(v)

// Floats.
#define _mm512_min_ps(a, b) HOST_ZIP(float, a, b, x < y ? x : y)
#define _mm512_max_ps(a, b) HOST_ZIP(float, a, b, x > y ? x : y)
#define _mm512_min_pd(a, b) HOST_ZIP(double, a, b, x < y ? x : y)
#define _mm512_max_pd(a, b) HOST_ZIP(double, a, b, x > y ? x : y)
#define _mm512_fmadd_ps(a, b, c) host::fused<float>(a, b, c, 1)
#define _mm512_fmadd_pd(a, b, c) host::fused<double>(a, b, c, 1)
#define _mm512_fnmadd_ps(a, b, c) host::fused<float>(a, b, c, -1)
#undef _mm512_roundscale_ps
#undef _mm512_roundscale_pd
#define _mm512_roundscale_ps(v, control) host::rounded<float, (control)>(v)
#define _mm512_roundscale_pd(v, control) host::rounded<double, (control)>(v)
#define _mm512_rcp14_ps(v) HOST_ZIP(float, v, v, (static_cast<void>(y), host::reciprocal_of_14_bits(x)))
#define _mm512_reduce_add_ps(v) host::total<float>(v)
#define _mm512_reduce_add_pd(v) host::total<double>(v)

// Lanes.
#undef _mm512_permute_ps
#undef _mm512_permute_pd
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#undef _mm512_i32gather_ps
#undef _mm512_i32gather_pd
#define _mm512_shuffle_f32x4(a, b, control) host::shuffled_quarters(a, b, control)
#define _mm512_shuffle_f64x2(a, b, control) host::shuffled_quarters(a, b, control)
#define _mm512_permute_ps(v, control) host_permuted<float>(v, control)
#define _mm512_permute_pd(v, control) host_permuted<double>(v, control)
// Within a lane of 128 bits: of four floats by 2 bits each, of two doubles by a bit each of all.
template <class T>
host::Wide<T> host_permuted(host::Wide<T> v, int control) {
  const host::Numbers<T, host::Wide<T>> n(v);
  return host::each<T, host::Wide<T>>([&](int i) {
    if (sizeof(T) == 8) return n.v[i / 2 * 2 + (control >> i & 1)];
    return n.v[i / 4 * 4 + (control >> (2 * (i % 4)) & 3)];
  });
}
#define _mm512_permutexvar_ps(index, v) host_looked_up_floats(index, v)
inline host::F512 host_looked_up_floats(host::R512 index, host::F512 table) {
  const host::R512 one = host::cast<host::R512>(table);
  return host::cast<host::F512>(host::looked_up<uint32_t>(index, &one, 1));
}
#define _mm512_permutexvar_epi16(index, v) host_looked_up_words(index, v)
inline host::R512 host_looked_up_words(host::R512 index, host::R512 table) {
  return host::looked_up<uint16_t>(index, &table, 1);
}
#define _mm512_permutex2var_epi16(a, index, b) host_looked_up_in_two(index, a, b)
inline host::R512 host_looked_up_in_two(host::R512 index, host::R512 a, host::R512 b) {
  const host::R512 both[2] = {a, b};
  return host::looked_up<uint16_t>(index, both, 2);
}
#define _mm512_i32gather_ps(index, from, scale) host::gathered<float>(from, host::Numbers<int32_t, host::R512>(index).v)
#define _mm512_i32gather_pd(index, from, scale) host::gathered<double>(from, host::Numbers<int32_t, __m256i>(index).v)
