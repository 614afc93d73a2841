// Windows of channels by themselves: a lane of a register has two codes of one channel, those of two pixels. The same
// 256-bit instructions in all sets.
#pragma once

#include <immintrin.h>

#include "unpack_weights.h"

#include "../generic/depthwise.h"

namespace cg::CG_ISA {
namespace {

struct PairWindow {
  static constexpr int64_t kPixels = 2;
  static constexpr int kNarrowBits = 8;

  // The order of vpunpcklbw and vpunpckhbw.
  static int64_t place(int64_t i) { return i / 8 % 2 * 32 + i / 16 * 16 + i % 8 * 2; }

  static CG_HD void dot_narrow(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pairs,
                               int64_t together, int32_t* sums) {
    __m256i wide[4] = {};
    for (int64_t pair = 0; pair < pairs;) {
      __m256i low{}, high{};
      for (const int64_t end = std::min(pair + together, pairs); pair < end; ++pair) {
        const __m256i x = load(codes + offsets[2 * pair]), y = load(codes + offsets[2 * pair + 1]);
        const uint8_t* const w = weights + pair * 64;
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(x, y), load(w)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(x, y), load(w + 32)));
      }
      wide[0] = _mm256_add_epi32(wide[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(low)));
      wide[1] = _mm256_add_epi32(wide[1], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(high)));
      wide[2] = _mm256_add_epi32(wide[2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(low, 1)));
      wide[3] = _mm256_add_epi32(wide[3], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(high, 1)));
    }
    store(wide, sums);
  }

  static CG_HD void dot_wide(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pairs,
                             int32_t* sums) {
    __m256i wide[4] = {};
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const __m256i x = load(codes + offsets[2 * pair]), y = load(codes + offsets[2 * pair + 1]);
      const __m256i low = _mm256_unpacklo_epi8(x, y), high = _mm256_unpackhi_epi8(x, y);
      const uint8_t* const w = weights + pair * 64;
      add_wide(_mm256_castsi256_si128(low), w, wide[0]);
      add_wide(_mm256_castsi256_si128(high), w + 32, wide[1]);
      add_wide(_mm256_extracti128_si256(low, 1), w + 16, wide[2]);
      add_wide(_mm256_extracti128_si256(high, 1), w + 48, wide[3]);
    }
    store(wide, sums);
  }

 private:
  static CG_HD __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  static CG_HD void store(const __m256i (&wide)[4], int32_t* sums) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * i), wide[i]);
  }

  // sums += the products of two codes of 8 channels.
  static CG_HD void add_wide(__m128i codes, const uint8_t* weights, __m256i& sums) {
    const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepu8_epi16(codes), w));
  }
};

using Depthwise = DepthwiseBy<PairWindow>;

}  // namespace
}  // namespace cg::CG_ISA
