// The signed staircase of up to 4 bits of one alpha, for numbers of 16 bits.
#pragma once

#include "compare_key.h"
#include "level_table.h"

#include "../generic/signed_table.h"

namespace cg::avx2 {

// A binary search of magnitudes: 7 thresholds, of which the next is looked up by the comparisons before. A negative x
// on a threshold is not above it, so its level has the larger magnitude: twice the magnitude, and one more if x is
// negative, is above twice the threshold, or twice and one more if that is no number of T.
template <class T>
  requires(sizeof(T) == 2)
struct SignedTable<T> {
  static constexpr bool kServed = true;
  using Key = CompareKey<T>;
  Register top, middle, low;  // thresholds: 4; 2 or 6; one of the others
  Register levels, codes;     // of each outcome, with comparison d as bit d
  Register p;

  CG_HD SignedTable(float alpha, float most) {
    const Floats k(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7));
    const Floats level = round_regular<T>(mul(k, Floats(alpha)));
    const __m256i below = _mm256_permutevar8x32_epi32(level.bits(), _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6));
    const Floats threshold = mul(level + Floats::of_bits(below), Floats(0.5f));
    const __m128i of_code = numbers(level), twice = twice_and_more(threshold);
    const auto table = [](__m128i entries, __m128i order) {
      return _mm256_broadcastsi128_si256(_mm_shuffle_epi8(entries, order));
    };
    top = table(twice, order_of(4, 4, 4, 4, 4, 4, 4, 4));
    middle = table(twice, order_of(2, 6, 2, 6, 2, 6, 2, 6));
    low = table(twice, order_of(1, 5, 3, 7, 1, 5, 3, 7));
    levels = table(of_code, order_of(0, 4, 2, 6, 1, 5, 3, 7));
    codes = _mm256_broadcastsi128_si256(_mm_setr_epi16(0, 4, 2, 6, 1, 5, 3, 7));
    p = _mm256_set1_epi16(static_cast<short>(most));
  }

  template <bool kCodes>
  CG_HD void store(const T* x, T* y, uint8_t* packed, int bits, bool stream) const {
    for (int i = 0; i < 64; i += 32) {
      Register found[2];
      for (int j = 0; j < 2; ++j) {
        const Register v = load_register(x + i + 16 * j);
        const Register twice = _mm256_sub_epi16(_mm256_slli_epi16(v, 1) ^ sign(), _mm256_srai_epi16(v, 15));
        const auto raise = [&](Register index, Register threshold, int by) {
          return Key::raise(index, _mm256_cmpgt_epi16(twice, threshold), by);
        };
        Register index = raise(Key::indices(Key::kIndexStart), top, Key::kIndexUnit);
        index = raise(index, _mm256_shuffle_epi8(middle, index), 2 * Key::kIndexUnit);
        index = raise(index, _mm256_shuffle_epi8(low, index), 4 * Key::kIndexUnit);
        const Register level = _mm256_shuffle_epi8(levels, index);
        const Register is_zero = _mm256_cmpeq_epi16(level, _mm256_setzero_si256());  // 0 is never -0
        store_or_stream(y + i + 16 * j, level | _mm256_andnot_si256(is_zero, v & sign()), stream);
        if constexpr (kCodes) found[j] = _mm256_add_epi16(_mm256_sign_epi16(_mm256_shuffle_epi8(codes, index), v), p);
      }
      if constexpr (kCodes) {
        if (bits == 2) Key::template store_codes<2>(packed + i / 4, found);
        else Key::template store_codes<4>(packed + i / 2, found);
      }
    }
  }

 private:
  static CG_HD Register sign() { return _mm256_set1_epi16(static_cast<short>(0x8000)); }
  static CG_HD __m128i order_of(int a, int b, int c, int d, int e, int f, int g, int h) {
    const __m128i entry = _mm_setr_epi16(a, b, c, d, e, f, g, h);
    return _mm_add_epi16(_mm_mullo_epi16(entry, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
  }
  static CG_HD __m128i narrow(__m256i v) { return _mm_packus_epi32(low_half(v), high_half(v)); }
  static CG_HD __m128i numbers(Floats v) {
    if constexpr (std::is_same_v<T, bf16>) return narrow(_mm256_srli_epi32(v.bits(), 16));
    else return f16_halves(v);
  }
  // Twice the number of T that is at most v, and one more unless it is v: with the top bit flipped, for signed
  // comparisons.
  static CG_HD __m128i twice_and_more(Floats v) {
    __m128i twice, equal;
    if constexpr (std::is_same_v<T, bf16>) {
      const __m256i number = _mm256_srli_epi32(v.bits(), 16);
      twice = narrow(_mm256_add_epi32(number, number));
      const __m256i rest = _mm256_cmpeq_epi32(v.bits() & _mm256_set1_epi32(0xffff), _mm256_setzero_si256());
      equal = _mm_packs_epi32(low_half(rest), high_half(rest));
    } else {
      const __m128i number = _mm256_cvtps_ph(v.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
      twice = _mm_add_epi16(number, number);
      const __m256i rest = _mm256_castps_si256(_mm256_cmp_ps(_mm256_cvtph_ps(number), v.v, _CMP_EQ_OQ));
      equal = _mm_packs_epi32(low_half(rest), high_half(rest));
    }
    const __m128i more = _mm_add_epi16(equal, _mm_set1_epi16(1));
    return _mm_xor_si128(_mm_add_epi16(twice, more), _mm_set1_epi16(static_cast<short>(0x8000)));
  }
};

}  // namespace cg::avx2
