// 16 floats or 8 doubles in a register, masks in mask registers. The interface is told in pack_scalar.h.
#pragma once

#include <immintrin.h>

#include "../../math/alpha_grad.h"
#include "../../math/bits.h"
#include "../generic/pair.h"

namespace cg::CG_ISA {
// Every machine with AVX-512 has these as one fast instruction.
CG_HD uint64_t spread_bits(uint64_t v) { return _pdep_u64(v, 0x5555555555555555u); }
CG_HD uint64_t unspread_bits(uint64_t v) { return _pext_u64(v, 0x5555555555555555u); }
}  // namespace cg::CG_ISA

#include "../generic/word_masks.h"  // which calls them

namespace cg::CG_ISA {

template <class M>
struct LaneMask {
  M m;
  friend CG_HD LaneMask operator&(LaneMask a, LaneMask b) { return {static_cast<M>(a.m & b.m)}; }
  friend CG_HD LaneMask operator|(LaneMask a, LaneMask b) { return {static_cast<M>(a.m | b.m)}; }
  friend CG_HD LaneMask operator!(LaneMask a) { return {static_cast<M>(~a.m)}; }
};

struct Floats {
  using scalar = float;
  using Mask = LaneMask<__mmask16>;
  __m512 v;
  CG_HD Floats() = default;
  CG_HD Floats(__m512 from) : v(from) {}
  explicit CG_HD Floats(float from) : v(_mm512_set1_ps(from)) {}
  friend CG_HD Floats operator+(Floats a, Floats b) { return _mm512_add_ps(a.v, b.v); }
  friend CG_HD Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
  friend CG_HD Floats operator/(Floats a, Floats b) { return _mm512_div_ps(a.v, b.v); }
  friend CG_HD Mask operator<=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  friend CG_HD Mask operator<(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend CG_HD Mask operator>(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend CG_HD Mask operator!=(Floats a, Floats b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
};
CG_HD Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
CG_HD Floats select(Floats::Mask m, Floats a, Floats b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
CG_HD Floats ceil(Floats a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
CG_HD Floats shift_bits_left(Floats a, int count) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), count));
}
CG_HD Floats min_of(Floats a, Floats b) { return _mm512_min_ps(a.v, b.v); }
CG_HD Floats max_of(Floats a, Floats b) { return _mm512_max_ps(a.v, b.v); }
CG_HD Floats times_pow2(Floats a, Floats shifted) {
  const __m512i exponents = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), exponents));
}
CG_HD Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// Newton's step squares the error, which is 2^-14 or less.
CG_HD Floats approximate_reciprocal(Floats d) {
  const __m512 guess = _mm512_rcp14_ps(d.v), error = _mm512_fnmadd_ps(d.v, guess, _mm512_set1_ps(1));
  return _mm512_fmadd_ps(guess, error, guess);
}

struct Doubles {
  using scalar = double;
  using Mask = LaneMask<__mmask8>;
  __m512d v;
  CG_HD Doubles() = default;
  CG_HD Doubles(__m512d from) : v(from) {}
  explicit CG_HD Doubles(double from) : v(_mm512_set1_pd(from)) {}
  friend CG_HD Doubles operator+(Doubles a, Doubles b) { return _mm512_add_pd(a.v, b.v); }
  friend CG_HD Doubles operator-(Doubles a, Doubles b) { return _mm512_sub_pd(a.v, b.v); }
  friend CG_HD Doubles operator/(Doubles a, Doubles b) { return _mm512_div_pd(a.v, b.v); }
  friend CG_HD Mask operator<=(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
  friend CG_HD Mask operator<(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend CG_HD Mask operator>(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend CG_HD Mask operator!=(Doubles a, Doubles b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
};
CG_HD Doubles mul(Doubles a, Doubles b) { return _mm512_mul_pd(a.v, b.v); }
CG_HD Doubles select(Doubles::Mask m, Doubles a, Doubles b) { return _mm512_mask_blend_pd(m.m, b.v, a.v); }
CG_HD Doubles ceil(Doubles a) { return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
CG_HD Doubles shift_bits_left(Doubles a, int count) {
  return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), count));
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
  static constexpr int kCount = 16;
  static CG_HD uint64_t bits(Floats::Mask m) { return m.m; }
  static CG_HD Floats::Mask mask(uint64_t bits) { return {static_cast<__mmask16>(bits)}; }
  static CG_HD Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static CG_HD void store(float* p, Floats v) { _mm512_storeu_ps(p, v.v); }
  static CG_HD void store_codes(uint8_t* p, Floats code) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code.v)));
  }
  static CG_HD Floats load_codes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static CG_HD float sum(Floats v) { return _mm512_reduce_add_ps(v.v); }
};
template <>
struct Lanes<Doubles> {
  static constexpr int kCount = 8;
  static CG_HD uint64_t bits(Doubles::Mask m) { return m.m; }
  static CG_HD Doubles::Mask mask(uint64_t bits) { return {static_cast<__mmask8>(bits)}; }
  static CG_HD Doubles load(const double* p) { return _mm512_loadu_pd(p); }
  static CG_HD void store(double* p, Doubles v) { _mm512_storeu_pd(p, v.v); }
  static CG_HD void store_codes(uint8_t* p, Doubles code) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(_mm512_cvtpd_epi64(code.v)));
  }
  static CG_HD Doubles load_codes(const uint8_t* p) {
    return _mm512_cvtepi64_pd(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static CG_HD double sum(Doubles v) { return _mm512_reduce_add_pd(v.v); }
};

// The upper half of each 32-bit lane after rounding is the bfloat16; the lower half is left as it falls.
CG_HD __m512i bf16_round_bits(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
CG_HD __m512i bf16_round_or_quiet_bits(__m512 v) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(bf16_round_bits(v), is_nan, _mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
}
CG_HD Floats keep_upper_half(__m512i u) {
  return _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
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
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
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
  return _mm512_castsi512_ps(bf16_round_or_quiet_bits(v.v));
}
template <class T>
CG_HD Doubles round_for_store(Doubles v) {
  return v;
}

template <class T>
struct Io;
template <>
struct Io<float> {
  static CG_HD Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static CG_HD void store(float* p, Floats v) { _mm512_storeu_ps(p, v.v); }
  static CG_HD void stream(float* p, Floats v) { _mm512_stream_ps(p, v.v); }
};
template <>
struct Io<double> {
  static CG_HD Doubles load(const double* p) { return _mm512_loadu_pd(p); }
  static CG_HD void store(double* p, Doubles v) { _mm512_storeu_pd(p, v.v); }
  static CG_HD void stream(double* p, Doubles v) { _mm512_stream_pd(p, v.v); }
};
template <>
struct Io<bf16> {
  static CG_HD Floats load(const bf16* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static CG_HD __m256i halves(Floats v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v.v), 16)); }
  static CG_HD void store(bf16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
  static CG_HD void stream(bf16* p, Floats v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
};
template <>
struct Io<f16> {
  static CG_HD Floats load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static CG_HD __m256i halves(Floats v) { return _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static CG_HD void store(f16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
  static CG_HD void stream(f16* p, Floats v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
};

// A register of T as two vectors, and back. Of bfloat16 the numbers at even places and those at odd ones, in fewer
// instructions than the two halves take; none is a NaN but one of bfloat16, so that rounding carries none over. Without
// kTiesToEven bfloat16's ties go up in magnitude, which takes a quarter of the instructions.
template <class T>
CG_HD Pair<Floats> split(__m512i both) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), keep_upper_half(both)};
  } else {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
}
template <class T, bool kTiesToEven = true>
CG_HD __m512i join(Pair<Floats> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto bits = [](Floats p) {
      if constexpr (kTiesToEven) return bf16_round_bits(p.v);
      else return _mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_set1_epi32(0x8000));
    };
    return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(bits(v.first), 16), bits(v.second));
  } else {
    return _mm512_inserti64x4(_mm512_castsi256_si512(Io<f16>::halves(v.first)), Io<f16>::halves(v.second), 1);
  }
}
CG_HD Pair<Floats> load_pair(const bf16* p) { return split<bf16>(_mm512_loadu_si512(p)); }
CG_HD Pair<Floats> load_pair_where(const bf16* block, uint64_t bits, int first) {
  return split<bf16>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits >> first), block + first));
}
CG_HD void store_pair(bf16* p, Pair<Floats> v, bool stream) {
  const __m512i both = join<bf16>(v);
  if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
  else _mm512_storeu_si512(p, both);
}

CG_HD __m512i four(__m128i a, __m128i b, __m128i c, __m128i d) {
  return _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2), d, 3);
}
// The codes of a block, a byte each, packed. A sum of products gathers neighbouring fields, two at a time.
template <int kWidth>
CG_HD void bitpack_block(__m512i v, uint8_t* packed) {
  if constexpr (kWidth == 1) {
    const uint64_t bits = _mm512_test_epi8_mask(v, v);
    memcpy(packed, &bits, sizeof(bits));
  } else if constexpr (kWidth == 2) {
    const __m512i words = _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x0401));
    const __m512i dwords = _mm512_madd_epi16(words, _mm512_set1_epi32(0x00100001));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(dwords));
  } else if constexpr (kWidth == 4) {
    const __m512i words = _mm512_maddubs_epi16(v, _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(words));
  } else {
    _mm512_storeu_si512(packed, v);
  }
}

template <int kCount, class U>
CG_HD void masked_copy(const U* from, U* to, uint64_t bits, int first, bool stream) {
  for (int i = first; i < first + kCount; i += 64 / static_cast<int>(sizeof(U))) {
    __m512i v;
    if constexpr (sizeof(U) == 2) v = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits >> i), from + i);
    else if constexpr (sizeof(U) == 4) v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits >> i), from + i);
    else v = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(bits >> i), from + i);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), v);
    else _mm512_storeu_si512(to + i, v);
  }
}

// The codes are loaded in the pieces that they may have been stored in: a load wider than the stores before it waits
// for them to leave the store buffer.
template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  const __m128i* p = reinterpret_cast<const __m128i*>(codes);
  const auto load = [&](int i) { return _mm_loadu_si128(p + i); };
  bitpack_block<kWidth>(four(load(0), load(1), load(2), load(3)), packed);
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  __m512i v;
  if constexpr (kWidth == 1) {
    uint64_t bits;
    memcpy(&bits, packed, sizeof(bits));
    v = _mm512_maskz_set1_epi8(bits, 1);
  } else if constexpr (kWidth == 2) {
    const __m512i dwords = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    v = _mm512_or_si512(dwords, _mm512_slli_epi32(dwords, 12));
    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_slli_epi32(v, 6)), _mm512_set1_epi8(3));
  } else if constexpr (kWidth == 4) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    v = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
  } else {
    v = _mm512_loadu_si512(packed);
  }
  _mm512_storeu_si512(codes, v);
}
// By halves: a whole register loaded just after it was stored waits too.
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  const __m256i* p = reinterpret_cast<const __m256i*>(codes);
  const __m256i low = _mm256_loadu_si256(p), high = _mm256_loadu_si256(p + 1);
  return _mm256_test_epi8_mask(low, low) | static_cast<uint64_t>(_mm256_test_epi8_mask(high, high)) << 32;
}

template <class V>
struct LargeTable;
template <>
struct LargeTable<Floats> {
  const float* entries;
  CG_HD LargeTable(const float* from, int) : entries(from) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_i32gather_ps(index, entries, 4);
  }
};
template <>
struct LargeTable<Doubles> {
  const double* entries;
  CG_HD LargeTable(const double* from, int) : entries(from) {}
  CG_HD Doubles at(const uint8_t* codes) const {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return _mm512_i32gather_pd(_mm256_cvtepu8_epi32(eight), entries, 8);
  }
};

template <class V>
struct SmallTable {
  static constexpr int kSize = 0;
};
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  __m512 entries;
  CG_HD SmallTable(const float* from, int size)
      : entries(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << size) - 1), from)) {}
  CG_HD Floats at(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(bytes), entries);
  }
};

// times_slopes_block of slopes.inl for 32 numbers of bf16 at a time: those in even and those in odd places become
// floats by a shift and a mask, and are rounded together as the upper and lower halves of their bits. A NaN of dy has
// nothing in its lower half and a product makes it quiet, so rounding keeps it; a NaN slope is made so first.
template <int kWidth>
CG_HD void times_slopes_block(const bf16* grad_y, const uint8_t* packed, const SmallTable<Floats>& table, bf16* grad_x,
                              bool stream) {
  uint8_t codes[64];
  bitunpack<kWidth>(packed, codes);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const Floats entries(table.entries), slopes = select(entries != entries, round_to<bf16>(entries), entries);
  const auto product = [&](__m512i dy, __m512i index) {
    const Floats slope = _mm512_permutexvar_ps(index, slopes.v);  // which heeds the low 4 bits of an index
    return _mm512_castps_si512(times_slope(Floats(_mm512_castsi512_ps(dy)), slope).v);
  };
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  for (int i = 0; i < 64; i += 32) {
    const __m512i dy = _mm512_loadu_si512(grad_y + i);
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    const __m512i even = product(_mm512_slli_epi32(dy, 16), index);
    const __m512i odd = product(_mm512_and_si512(dy, upper), _mm512_srli_epi32(index, 16));
    const __m512i high = _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(even, 16), odd);
    const __m512i low = _mm512_mask_blend_epi16(kOdd, even, _mm512_slli_epi32(odd, 16));
    const __m512i one = _mm512_set1_epi16(1), half = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i beyond_even = _mm512_adds_epu16(low, _mm512_and_si512(high, one));
    const __m512i dx = _mm512_mask_add_epi16(high, _mm512_cmpgt_epu16_mask(beyond_even, half), high, one);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(grad_x + i), dx);
    else _mm512_storeu_si512(grad_x + i, dx);
  }
}

constexpr int kPrefetchBytes = 0, kChains = 1;
template <class V>
constexpr bool kAddsWeighed = false;

// Streamed stores are weakly ordered: fence before another thread may read.
CG_HD void stream_fence() { _mm_sfence(); }

}  // namespace cg::CG_ISA
