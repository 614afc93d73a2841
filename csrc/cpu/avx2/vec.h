// 8 floats or 4 doubles in a register, masks in registers too. The interface is told in pack_scalar.h.
#pragma once

#include <immintrin.h>

#include "../../math/alpha_grad.h"
#include "bits.h"
#include "../generic/pair.h"

namespace cg::CG_ISA {

struct FloatMask {
  __m256 m;
  friend CG_HD FloatMask operator&(FloatMask a, FloatMask b) { return {_mm256_and_ps(a.m, b.m)}; }
  friend CG_HD FloatMask operator|(FloatMask a, FloatMask b) { return {_mm256_or_ps(a.m, b.m)}; }
  friend CG_HD FloatMask operator!(FloatMask a) {
    return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
  }
};

struct Floats {
  using scalar = float;
  __m256 v;
  CG_HD Floats() = default;
  CG_HD Floats(__m256 from) : v(from) {}
  explicit CG_HD Floats(float from) : v(_mm256_set1_ps(from)) {}
  friend CG_HD Floats operator+(Floats a, Floats b) { return _mm256_add_ps(a.v, b.v); }
  friend CG_HD Floats operator-(Floats a, Floats b) { return _mm256_sub_ps(a.v, b.v); }
  friend CG_HD Floats operator/(Floats a, Floats b) { return _mm256_div_ps(a.v, b.v); }
  friend CG_HD FloatMask operator<=(Floats a, Floats b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
  friend CG_HD FloatMask operator<(Floats a, Floats b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend CG_HD FloatMask operator>(Floats a, Floats b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  friend CG_HD FloatMask operator!=(Floats a, Floats b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
};
CG_HD Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a.v, b.v); }
CG_HD Floats select(FloatMask m, Floats a, Floats b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
CG_HD Floats ceil(Floats a) { return _mm256_ceil_ps(a.v); }
CG_HD Floats floor(Floats a) { return _mm256_floor_ps(a.v); }
CG_HD Floats shift_bits_left(Floats a, int count) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), count));
}
CG_HD Floats min_of(Floats a, Floats b) { return _mm256_min_ps(a.v, b.v); }
CG_HD FloatMask is_positive(Floats a) { return {_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_NLE_UQ)}; }
CG_HD Floats max_of(Floats a, Floats b) { return _mm256_max_ps(a.v, b.v); }
CG_HD Floats times_pow2(Floats a, Floats shifted) {
  const __m256i exponents = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), exponents));
}
CG_HD Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
// Newton's step squares the error, which is 2^-11 or less, as CPUs differ.
CG_HD Floats approximate_reciprocal(Floats d) {
  const __m256 guess = _mm256_rcp_ps(d.v), error = _mm256_fnmadd_ps(d.v, guess, _mm256_set1_ps(1));
  return _mm256_fmadd_ps(guess, error, guess);
}

struct DoubleMask {
  __m256d m;
  friend CG_HD DoubleMask operator&(DoubleMask a, DoubleMask b) { return {_mm256_and_pd(a.m, b.m)}; }
  friend CG_HD DoubleMask operator|(DoubleMask a, DoubleMask b) { return {_mm256_or_pd(a.m, b.m)}; }
  friend CG_HD DoubleMask operator!(DoubleMask a) {
    return {_mm256_xor_pd(a.m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))};
  }
};

struct Doubles {
  using scalar = double;
  __m256d v;
  CG_HD Doubles() = default;
  CG_HD Doubles(__m256d from) : v(from) {}
  explicit CG_HD Doubles(double from) : v(_mm256_set1_pd(from)) {}
  friend CG_HD Doubles operator+(Doubles a, Doubles b) { return _mm256_add_pd(a.v, b.v); }
  friend CG_HD Doubles operator-(Doubles a, Doubles b) { return _mm256_sub_pd(a.v, b.v); }
  friend CG_HD Doubles operator/(Doubles a, Doubles b) { return _mm256_div_pd(a.v, b.v); }
  friend CG_HD DoubleMask operator<=(Doubles a, Doubles b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
  friend CG_HD DoubleMask operator<(Doubles a, Doubles b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
  friend CG_HD DoubleMask operator>(Doubles a, Doubles b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
  friend CG_HD DoubleMask operator!=(Doubles a, Doubles b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_NEQ_UQ)}; }
};
CG_HD Doubles mul(Doubles a, Doubles b) { return _mm256_mul_pd(a.v, b.v); }
CG_HD Doubles select(DoubleMask m, Doubles a, Doubles b) { return _mm256_blendv_pd(b.v, a.v, m.m); }
CG_HD Doubles ceil(Doubles a) { return _mm256_ceil_pd(a.v); }
CG_HD Doubles shift_bits_left(Doubles a, int count) {
  return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v), count));
}

template <class A>
struct VecOf {
  using type = Floats;
};
template <>
struct VecOf<double> {
  using type = Doubles;
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class V>
struct Lanes;
template <>
struct Lanes<Floats> {
  static constexpr int kCount = 8;
  static CG_HD uint64_t bits(FloatMask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }
  static CG_HD FloatMask mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane))};
  }
  static CG_HD Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static CG_HD void store(float* p, Floats v) { _mm256_storeu_ps(p, v.v); }
  static CG_HD void store_codes(uint8_t* p, Floats code) {
    const __m256i c = _mm256_cvtps_epi32(code.v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static CG_HD Floats load_codes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static CG_HD float sum(Floats v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};
template <>
struct Lanes<Doubles> {
  static constexpr int kCount = 4;
  static CG_HD uint64_t bits(DoubleMask m) { return static_cast<uint32_t>(_mm256_movemask_pd(m.m)); }
  static CG_HD DoubleMask mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(bits));
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane))};
  }
  static CG_HD Doubles load(const double* p) { return _mm256_loadu_pd(p); }
  static CG_HD void store(double* p, Doubles v) { _mm256_storeu_pd(p, v.v); }
  static CG_HD void store_codes(uint8_t* p, Doubles code) {
    const __m128i c = _mm256_cvtpd_epi32(code.v);
    const __m128i words = _mm_packus_epi32(c, c);
    const int four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    memcpy(p, &four, 4);
  }
  static CG_HD Doubles load_codes(const uint8_t* p) {
    int four;
    memcpy(&four, p, 4);
    return _mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
  }
  static CG_HD double sum(Doubles v) {
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v.v), _mm256_extractf128_pd(v.v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

// The upper half of each 32-bit lane after rounding is the bfloat16; the lower half is left as it falls.
CG_HD __m256i bf16_round_bits(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
CG_HD __m256i bf16_round_or_quiet_bits(__m256 v) {
  const __m256 quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  const __m256 rounded = _mm256_castsi256_ps(bf16_round_bits(v)), is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_castps_si256(_mm256_blendv_ps(rounded, quiet, is_nan));
}
CG_HD Floats keep_upper_half(__m256i u) {
  return _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

template <class T>
CG_HD Floats round_level(Floats v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  else return round_to<T>(v);
}
template <class T>
CG_HD Floats round_to(Floats v);
template <>
CG_HD Floats round_to<float>(Floats v) {
  return v;
}
template <>
CG_HD Floats round_to<bf16>(Floats v) {
  return keep_upper_half(bf16_round_or_quiet_bits(v.v));
}
template <>
CG_HD Floats round_level<bf16>(Floats v) {
  return keep_upper_half(bf16_round_bits(v.v));
}
template <>
CG_HD Floats round_to<f16>(Floats v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <class T>
CG_HD Doubles round_to(Doubles v) {
  return v;
}
template <class T>
CG_HD Doubles round_level(Doubles v) {
  return v;
}

// Rounding for Io<T>::store, which itself rounds to f16 and drops the lower half for bf16.
template <class T>
CG_HD Floats round_for_store(Floats v) {
  return v;
}
template <>
CG_HD Floats round_for_store<bf16>(Floats v) {
  return _mm256_castsi256_ps(bf16_round_or_quiet_bits(v.v));
}
template <class T>
CG_HD Doubles round_for_store(Doubles v) {
  return v;
}

template <class T>
struct Io;
template <>
struct Io<float> {
  static CG_HD Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static CG_HD void store(float* p, Floats v) { _mm256_storeu_ps(p, v.v); }
  static CG_HD void stream(float* p, Floats v) { _mm256_stream_ps(p, v.v); }
};
template <>
struct Io<double> {
  static CG_HD Doubles load(const double* p) { return _mm256_loadu_pd(p); }
  static CG_HD void store(double* p, Doubles v) { _mm256_storeu_pd(p, v.v); }
  static CG_HD void stream(double* p, Doubles v) { _mm256_stream_pd(p, v.v); }
};
template <>
struct Io<bf16> {
  static CG_HD Floats load(const bf16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static CG_HD __m128i halves(Floats v) {
    const __m256i u = _mm256_srli_epi32(_mm256_castps_si256(v.v), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  }
  static CG_HD void store(bf16* p, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
  static CG_HD void stream(bf16* p, Floats v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
};
template <>
struct Io<f16> {
  static CG_HD Floats load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static CG_HD __m128i halves(Floats v) { return _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static CG_HD void store(f16* p, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
  static CG_HD void stream(f16* p, Floats v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves(v)); }
};

CG_HD Floats masked(Floats v, __m256i mask) { return _mm256_and_ps(v.v, _mm256_castsi256_ps(mask)); }
CG_HD Doubles masked(Doubles v, __m256i mask) { return _mm256_and_pd(v.v, _mm256_castsi256_pd(mask)); }

// A register of T as two vectors, and back. Of bfloat16 the numbers at even places and those at odd ones, in fewer
// instructions than the two halves take; none is a NaN but one of bfloat16, so that rounding carries none over. Without
// kTiesToEven bfloat16's ties go up in magnitude, which takes a quarter of the instructions.
template <class T>
CG_HD Pair<Floats> split(__m256i both) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), keep_upper_half(both)};
  } else {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(both)), _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
  }
}
template <class T, bool kTiesToEven = true>
CG_HD __m256i join(Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto bits = [](Floats p) {
      if constexpr (kTiesToEven) return bf16_round_bits(p.v);
      else return _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_set1_epi32(0x8000));
    };
    return _mm256_blend_epi16(_mm256_srli_epi32(bits(v.first), 16), bits(v.second), 0xaa);
  } else {
    return _mm256_setr_m128i(Io<f16>::halves(v.first), Io<f16>::halves(v.second));
  }
}
CG_HD Pair<Floats> load_pair(const bf16* p) {
  return split<bf16>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T, class Bits>
CG_HD auto load_where(const T* block, Bits bits, int first) {
  return masked(Io<T>::load(block + first), bits.template mask<sizeof(compute_t<T>)>(first));
}
template <class Bits>
CG_HD Pair<Floats> load_pair_where(const bf16* block, Bits bits, int first) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + first));
  return split<bf16>(_mm256_and_si256(bits.template mask<2>(first), v));
}
CG_HD void store_pair(bf16* p, Pair<Floats> v, bool stream) {
  const __m256i both = join<bf16>(v);
  if (stream) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), both);
  else _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), both);
}

template <class V>
struct LargeTable;
template <>
struct LargeTable<Floats> {
  const float* entries;
  CG_HD LargeTable(const float* from, int) : entries(from) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_i32gather_ps(entries, index, 4);
  }
};
template <>
struct LargeTable<Doubles> {
  const double* entries;
  CG_HD LargeTable(const double* from, int) : entries(from) {}
  CG_HD Doubles at(const uint8_t* codes) const {
    int four;
    memcpy(&four, codes, 4);
    return _mm256_i32gather_pd(entries, _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)), 8);
  }
};

template <class V>
struct SmallTable {
  static constexpr int kSize = 0;
};
// Entries are found by the low 4 bits of an index, or the low 2, and repeat where there are fewer.
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  __m256 low, high;
  CG_HD SmallTable(const float* from, int size) {
    float entries[kSize];
    for (int i = 0; i < kSize; ++i) entries[i] = from[i % size];
    low = _mm256_loadu_ps(entries);
    high = _mm256_loadu_ps(entries + 8);
  }
  template <int kWidth>
  CG_HD Floats look_up(__m256i index) const {
    if constexpr (kWidth <= 2) return _mm256_permutevar_ps(low, index);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // the sign is bit 3
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
  }
};

// The entries for the 2 bits of 16 numbers of a block from the given one on, and those times dy, added to the sums.
template <bool kEvenOdd>
CG_HD Pair<Floats> weights_of(const uint8_t* packed, const SmallTable<Floats>& weights, int first) {
  __m256i one, other;
  packed_indices<2, kEvenOdd>(packed, first, one, other);
  return {weights.template look_up<2>(one), weights.template look_up<2>(other)};
}
template <class T>
CG_HD void add_weighed(const T* grad_y, const uint8_t* packed, const SmallTable<Floats>& weights, int first,
                       Pair<Floats>& sums) {
  constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
  Pair<Floats> dy;
  if constexpr (kEvenOdd) dy = load_pair(grad_y + first);
  else dy = {Io<T>::load(grad_y + first), Io<T>::load(grad_y + first + 8)};
  sums = mul_add(dy, weights_of<kEvenOdd>(packed, weights, first), sums);
}

// times_slopes_block of slopes.inl straight from the packed codes. Of bfloat16 the numbers in even and those in odd
// places; a NaN of dy has nothing in its lower half and a product makes it quiet, so rounding keeps it; a NaN slope is
// made so first.
template <int kWidth, class T>
CG_HD void times_slopes_block(const T* grad_y, const uint8_t* packed, const SmallTable<Floats>& table, T* grad_x,
                              bool stream) {
  constexpr bool kApproximate = std::is_same_v<T, bf16>;
  SmallTable<Floats> slopes = table;
  if constexpr (kApproximate) {
    const auto quiet = [](__m256 v) { return select(Floats(v) != Floats(v), round_to<bf16>(v), Floats(v)).v; };
    slopes.low = quiet(slopes.low);
    slopes.high = quiet(slopes.high);
  }
  for (int i = 0; i < 64; i += 16) {
    __m256i first, second;
    packed_indices<kWidth, kApproximate>(packed, i, first, second);
    const Pair<Floats> slope{slopes.template look_up<kWidth>(first), slopes.template look_up<kWidth>(second)};
    if constexpr (kApproximate) {
      store_pair(grad_x + i, times_slope(load_pair(grad_y + i), slope), stream);
    } else {
      const auto dx = times_slope(Pair<Floats>{Io<T>::load(grad_y + i), Io<T>::load(grad_y + i + 8)}, slope);
      if (stream) Io<T>::stream(grad_x + i, dx.first), Io<T>::stream(grad_x + i + 8, dx.second);
      else Io<T>::store(grad_x + i, dx.first), Io<T>::store(grad_x + i + 8, dx.second);
    }
  }
}

// How far ahead of the loads memory is asked for. Hardware does it too, but only some instructions ahead.
constexpr int kPrefetchBytes = 2048;
constexpr int kChains = 2;
template <class V>
constexpr bool kAddsWeighed = std::is_same_v<V, Floats>;

// Streamed stores are weakly ordered: fence before another thread may read.
CG_HD void stream_fence() { _mm_sfence(); }

}  // namespace cg::CG_ISA
