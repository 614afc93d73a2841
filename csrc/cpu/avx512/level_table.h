// Packed codes to levels.
#pragma once

#include "compare_key.h"

#include "../x86/level_table.h"

namespace cg::avx512 {

template <class T>
  requires(sizeof(T) <= 4)
struct LevelTable<T, 1> {
  static constexpr bool kServed = true;
  Register level;
  CG_HD LevelTable(const T* levels, float) {
    if constexpr (sizeof(T) == 2) level = _mm512_set1_epi16(bit_cast<int16_t>(levels[1]));
    else level = _mm512_set1_epi32(bit_cast<int32_t>(levels[1]));
  }
  CG_HD void store(const uint8_t* packed, T* y, bool stream) const {
    uint64_t bits;
    memcpy(&bits, packed, sizeof(bits));
    for (int i = 0; i < 64; i += static_cast<int>(sizeof(Register) / sizeof(T))) {
      if constexpr (sizeof(T) == 2) {
        store_or_stream(y + i, _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits >> i), level), stream);
      } else {
        store_or_stream(y + i, _mm512_maskz_mov_epi32(static_cast<__mmask16>(bits >> i), level), stream);
      }
    }
  }
};

// A look-up of 16 bits by 5 of them: each lane shifts the 16 bits that its code is in, and the entries repeat where the
// codes are shorter.
template <class T, int kWidth>
  requires(sizeof(T) == 2 && (kWidth == 2 || kWidth == 4))
struct LevelTable<T, kWidth> {
  static constexpr bool kServed = true;
  static constexpr int kInWord = 16 / kWidth, kCount = 32;
  Register table, word, place;
  CG_HD LevelTable(const T* levels, float) {
    uint16_t entries[kCount], places[kCount];
    uint8_t bytes[2 * kCount];
    for (int i = 0; i < kCount; ++i) {
      entries[i] = levels[i % (1 << kWidth)].bits;
      places[i] = static_cast<uint16_t>(i % kInWord * kWidth);
      for (int of = 0; of < 2; ++of) bytes[2 * i + of] = static_cast<uint8_t>(2 * (i / kInWord) + of);
    }
    table = load_register(entries), place = load_register(places), word = load_register(bytes);
  }
  CG_HD void store(const uint8_t* packed, T* y, bool stream) const {
    for (int i = 0; i < 64; i += kCount) {
      Register all;  // in each quarter, which is as far as a shuffle reaches
      if constexpr (kWidth == 2) {
        int64_t bits;
        memcpy(&bits, packed + i / 4, sizeof(bits));
        all = broadcast_int64(bits);
      } else {
        all = _mm512_broadcast_i32x4(load_quarter(packed + i / 2));
      }
      const Register code = _mm512_srlv_epi16(_mm512_shuffle_epi8(all, word), place);
      store_or_stream(y + i, _mm512_permutexvar_epi16(code, table), stream);
    }
  }
};

}  // namespace cg::avx512
