// Packed codes to levels.
#pragma once

#include "compare_key.h"

#include "../x86/level_table.h"

namespace cg::avx2 {

template <class T>
  requires(sizeof(T) <= 4)
struct LevelTable<T, 1> {
  static constexpr bool kServed = true;
  Register level;
  CG_HD LevelTable(const T* levels, float) {
    if constexpr (sizeof(T) == 2) level = _mm256_set1_epi16(bit_cast<int16_t>(levels[1]));
    else level = _mm256_set1_epi32(bit_cast<int32_t>(levels[1]));
  }
  CG_HD void store(const uint8_t* packed, T* y, bool stream) const {
    uint64_t bits;
    memcpy(&bits, packed, sizeof(bits));
    const BlockBits block(bits);
    for (int i = 0; i < 64; i += static_cast<int>(sizeof(Register) / sizeof(T))) {
      store_or_stream(y + i, block.template mask<sizeof(T)>(i) & level, stream);
    }
  }
};

// A look-up in tables of bytes by half a byte, which is a code of 4 bits or two of 2 bits. The shuffles and unpacks
// stay within the halves of a register: the packed codes are first put where they leave levels in order.
template <class T, int kWidth>
  requires(sizeof(T) == 2 && (kWidth == 2 || kWidth == 4))
struct LevelTable<T, kWidth> {
  static constexpr bool kServed = true;
  static constexpr int kCodes = 4 / kWidth;  // in half a byte
  Register low[kCodes], high[kCodes];        // the bytes of their levels
  CG_HD LevelTable(const T* levels, float) {
    for (int at = 0; at < kCodes; ++at) {
      uint8_t low_bytes[16], high_bytes[16];
      for (int i = 0; i < 16; ++i) {
        const uint16_t level = levels[i >> at * kWidth & ((1 << kWidth) - 1)].bits;
        low_bytes[i] = static_cast<uint8_t>(level), high_bytes[i] = static_cast<uint8_t>(level >> 8);
      }
      low[at] = _mm256_broadcastsi128_si256(load_half(low_bytes));
      high[at] = _mm256_broadcastsi128_si256(load_half(high_bytes));
    }
  }
  CG_HD void store(const uint8_t* packed, T* y, bool stream) const {
    const __m256i half_byte = _mm256_set1_epi8(15);
    if constexpr (kWidth == 4) {
      const __m256i even_first = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
      const __m256i bytes = _mm256_permutevar8x32_epi32(load_register(packed), even_first);
      const __m256i first = bytes & half_byte, second = _mm256_srli_epi16(bytes, 4) & half_byte;
      const __m256i codes[2] = {_mm256_unpacklo_epi8(first, second), _mm256_unpackhi_epi8(first, second)};
      for (int i = 0; i < 2; ++i) {
        const __m256i a = _mm256_shuffle_epi8(low[0], codes[i]), b = _mm256_shuffle_epi8(high[0], codes[i]);
        store_or_stream(y + 32 * i, _mm256_unpacklo_epi8(a, b), stream);
        store_or_stream(y + 32 * i + 16, _mm256_unpackhi_epi8(a, b), stream);
      }
    } else {
      const __m256i even_first = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                  2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(packed)), even_first);
      const __m256i pairs = _mm256_unpacklo_epi8(bytes & half_byte, _mm256_srli_epi16(bytes, 4) & half_byte);
      __m256i of[2][2];  // the bytes of the first code of each pair, and of the second
      for (int at = 0; at < 2; ++at) {
        of[at][0] = _mm256_shuffle_epi8(low[at], pairs), of[at][1] = _mm256_shuffle_epi8(high[at], pairs);
      }
      const auto store_two = [&](T* y, __m256i first, __m256i second) {
        store_or_stream(y, _mm256_unpacklo_epi16(first, second), stream);
        store_or_stream(y + 16, _mm256_unpackhi_epi16(first, second), stream);
      };
      store_two(y, _mm256_unpacklo_epi8(of[0][0], of[0][1]), _mm256_unpacklo_epi8(of[1][0], of[1][1]));
      store_two(y + 32, _mm256_unpackhi_epi8(of[0][0], of[0][1]), _mm256_unpackhi_epi8(of[1][0], of[1][1]));
    }
  }
};

}  // namespace cg::avx2
