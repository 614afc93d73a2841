// Products of codes and weights of each channel by itself: a lane of a register has two codes of one channel, those of
// two pixels of its window. The same 256-bit instructions in all sets.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "../generic/dot_panel.h"
#include "unpack_weights.h"

namespace cg::CG_ISA {
namespace {

// What integer_layer.h wants of a set that multiplies channels by themselves.
struct Depthwise {
  static constexpr int64_t kChannels = 32;

  // How many sums of two products stay in 16 bits. If none does, pairs are of one pixel.
  static int64_t at_once(const IntegerLayer& a) {
    return 32767 / (2 * ((1 << a.bits) - 1) * (1 << (a.weight_bits - 1)));
  }
  static int64_t pairs(const IntegerLayer& a) {
    const int64_t pixels = a.kernel[0] * a.kernel[1];
    return at_once(a) > 0 ? (pixels + 1) / 2 : pixels;
  }
  static int64_t pixels_per_pair(const IntegerLayer& a) { return at_once(a) > 0 ? 2 : 1; }

  // Where in the window both pixels of each pair are, and [channels / 32, pairs, 64] weights.
  static void order(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* weights, int64_t channels,
                    uint8_t* unpacked, uint8_t* to) {
    const int64_t pixels = a.kernel[0] * a.kernel[1], pair_count = pairs(a), per_pair = pixels_per_pair(a);
    int64_t* const offsets = reinterpret_cast<int64_t*>(to);
    for (int64_t i = 0; i < 2 * pair_count; ++i) {
      const int64_t pixel = std::min(i / 2 * per_pair + i % per_pair, pixels - 1);
      offsets[i] = pixel / a.kernel[1] * shape.piece_stride + pixel % a.kernel[1] * a.dilation[1] * a.channels;
    }
    to += shape.offset_bytes;
    memset(to, 0, IntegerShape::rounded(channels, kChannels) * pair_count * 2);
    for (int64_t c = 0; c < channels; ++c) {
      unpack_row(weights + c * a.row_bytes, a.row_bytes, a.weight_bits, unpacked);
      // The order of vpunpcklbw and vpunpckhbw.
      const int64_t block = c / kChannels, i = c % kChannels, at = i / 8 % 2 * 32 + i / 16 * 16 + i % 8 * 2;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        to[(block * pair_count + pixel / per_pair) * 64 + at + pixel % per_pair] = unpacked[pixel];
      }
    }
  }

  static void dot(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* const* row, int64_t rows,
                  const uint8_t* weights, int64_t channels, int32_t* acc, int64_t acc_stride) {
    const int64_t* const offsets = reinterpret_cast<const int64_t*>(weights);
    const int64_t pair_count = pairs(a), together = std::max<int64_t>(1, at_once(a));
    weights += shape.offset_bytes;
    for (int64_t channel = 0; channel < channels; channel += kChannels, weights += pair_count * 64) {
      for (int64_t r = 0; r < rows; ++r) {
        dot_window(row[r] + channel, offsets, weights, pair_count, together, acc + r * acc_stride + channel);
      }
    }
  }

 private:
  static CG_HD __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  // The sums of 32 channels, from 0 on.
  static CG_HD void dot_window(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pairs,
                               int64_t together, int32_t* sums) {
    __m256i wide[4] = {};
    for (int64_t pair = 0; pair < pairs;) {
      __m256i low{}, high{};
      for (const int64_t end = std::min(pair + together, pairs); pair < end; ++pair) {
        const __m256i x = load(codes + offsets[2 * pair]), y = load(codes + offsets[2 * pair + 1]);
        const uint8_t* w = weights + pair * 64;
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(x, y), load(w)));
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(x, y), load(w + 32)));
      }
      wide[0] = _mm256_add_epi32(wide[0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(low)));
      wide[1] = _mm256_add_epi32(wide[1], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(high)));
      wide[2] = _mm256_add_epi32(wide[2], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(low, 1)));
      wide[3] = _mm256_add_epi32(wide[3], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(high, 1)));
    }
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * i), wide[i]);
  }
};

}  // namespace
}  // namespace cg::CG_ISA
