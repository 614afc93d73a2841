// What is packed, masks, states and codes, in registers: bits to masks of lanes and back, and codes to bytes and back.
#pragma once

#include <immintrin.h>

#include "../../math/bits.h"
#include "../../math/macros.h"

namespace cg::CG_ISA {

// The bits of a block in each half of a register, from where a shuffle takes those of a vector.
struct BlockBits {
  __m256i all;
  explicit CG_HD BlockBits(uint64_t bits) : all(_mm256_set1_epi64x(static_cast<long long>(bits))) {}

  // As a mask, those of the numbers of kBytes each from the given one on, which begins a vector.
  template <int kBytes>
  CG_HD __m256i mask(int first) const {
    const __m256i byte = _mm256_set1_epi8(static_cast<char>(first / 8));
    if constexpr (kBytes == 2) {
      const __m256i place = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i in_half = _mm256_setr_m128i(_mm_setzero_si128(), _mm_set1_epi8(1));
      const __m256i bits = _mm256_shuffle_epi8(all, _mm256_add_epi8(byte, in_half));
      return _mm256_cmpeq_epi16(_mm256_and_si256(bits, place), place);
    } else if constexpr (kBytes == 4) {
      const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_shuffle_epi8(all, byte), place), place);
    } else {
      const __m256i place = _mm256_sllv_epi64(_mm256_setr_epi64x(1, 2, 4, 8), _mm256_set1_epi64x(first % 8));
      return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_shuffle_epi8(all, byte), place), place);
    }
  }
};

// One bit of each of a block's 2-bit states, in the same way.
struct StateBits {
  __m256i all;
  int bit;

  template <int kBytes>
  CG_HD __m256i mask(int first) const {
    const __m256i byte = _mm256_set1_epi8(static_cast<char>(first / 4));
    if constexpr (kBytes == 2) {
      const __m256i place = _mm256_set1_epi64x(static_cast<long long>(0x0040001000040001u << bit));
      const __m256i next = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
      const __m256i bits = _mm256_shuffle_epi8(all, _mm256_add_epi8(byte, next));
      return _mm256_cmpeq_epi16(_mm256_and_si256(bits, place), place);
    } else if constexpr (kBytes == 4) {
      const __m256i one = _mm256_setr_epi32(1, 4, 16, 64, 1, 4, 16, 64), place = _mm256_slli_epi32(one, bit);
      const __m256i next = _mm256_setr_epi64x(0, 0, 0x0101010101010101, 0x0101010101010101);
      const __m256i bits = _mm256_shuffle_epi8(all, _mm256_add_epi8(byte, next));
      return _mm256_cmpeq_epi32(_mm256_and_si256(bits, place), place);
    } else {
      const __m256i place = _mm256_slli_epi64(_mm256_setr_epi64x(1, 4, 16, 64), bit);
      return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_shuffle_epi8(all, byte), place), place);
    }
  }
};
struct EitherBits {
  StateBits a, b;
  template <int kBytes>
  CG_HD __m256i mask(int first) const {
    return _mm256_or_si256(a.mask<kBytes>(first), b.mask<kBytes>(first));
  }
};
struct BlockStates {
  __m256i all;
  explicit CG_HD BlockStates(const uint8_t* packed)
      : all(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)))) {}
  CG_HD StateBits inside() const { return {all, 0}; }
  CG_HD StateBits above() const { return {all, 1}; }
  CG_HD EitherBits either() const { return {inside(), above()}; }
};

// Loads that are saved are not seen by Zen 3's own prefetching, which would ask for memory a second time.
CG_HD __m256i load_without_prefetch(const void* from) {
  __m256i all = _mm256_set1_epi32(-1);
  asm("" : "+x"(all));  // else it is a plain load
  return _mm256_maskload_epi32(static_cast<const int*>(from), all);
}

// cached: `from` was just read.
template <int kCount, class U, class Bits>
CG_HD void masked_copy(const U* from, U* to, Bits bits, int first, bool stream, bool cached = false) {
#pragma GCC unroll 16
  for (int i = first; i < first + kCount; i += 32 / static_cast<int>(sizeof(U))) {
    const __m256i mask = bits.template mask<sizeof(U)>(i);
    const __m256i* dy = reinterpret_cast<const __m256i*>(from + i);
    __m256i* dx = reinterpret_cast<__m256i*>(to + i);
    if (stream && !cached) _mm256_stream_si256(dx, _mm256_and_si256(mask, load_without_prefetch(dy)));
    else if (stream) _mm256_stream_si256(dx, _mm256_and_si256(mask, _mm256_loadu_si256(dy)));
    else _mm256_storeu_si256(dx, _mm256_and_si256(mask, _mm256_loadu_si256(dy)));
  }
}

// The signs of the bytes as bits.
CG_HD void store_signs(uint8_t* to, __m256i bytes) {
  const int bits = _mm256_movemask_epi8(bytes);
  memcpy(to, &bits, sizeof(bits));
}
// Half of the codes of a block, a byte each, packed. A sum of products gathers neighbouring fields, two at a time.
template <int kWidth>
CG_HD void bitpack_half(__m256i codes, uint8_t* packed) {
  if constexpr (kWidth == 1) {
    store_signs(packed, _mm256_slli_epi16(codes, 7));
  } else if constexpr (kWidth == 2) {
    const __m256i words = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0401));
    const __m256i dwords = _mm256_madd_epi16(words, _mm256_set1_epi32(0x00100001));
    const __m256i low = _mm256_packus_epi32(dwords, dwords), bytes = _mm256_packus_epi16(low, low);
    const __m128i halves = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), halves);
  } else if constexpr (kWidth == 4) {
    const __m256i words = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(bytes));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), codes);
  }
}
// The codes are loaded in the pieces that they may have been stored in: a load wider than the stores before it waits
// for them to leave the store buffer.
template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  const auto sixteen = [](const uint8_t* p) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), reinterpret_cast<const __m64*>(p + 8)));
  };
  for (int half = 0; half < 2; ++half, codes += 32, packed += 4 * kWidth) {
    bitpack_half<kWidth>(_mm256_setr_m128i(sixteen(codes), sixteen(codes + 16)), packed);
  }
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  for (int half = 0; half < 2; ++half, packed += 4 * kWidth) {
    __m256i v;
    if constexpr (kWidth == 1) {
      int bits;
      memcpy(&bits, packed, sizeof(bits));
      const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
      const __m256i place = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), of_byte);
      v = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bytes, place), place), _mm256_set1_epi8(1));
    } else if constexpr (kWidth == 2) {
      const __m256i dwords = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
      v = _mm256_or_si256(dwords, _mm256_slli_epi32(dwords, 12));
      v = _mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi32(v, 6)), _mm256_set1_epi8(3));
    } else if constexpr (kWidth == 4) {
      const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
      v = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
    } else {
      v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 32 * half), v);
  }
}
// In the low bits of each lane the packed codes of 16 numbers of a block from the given one on: the two halves', or those
// in even and those in odd places; above a code is what comes after it.
template <int kWidth, bool kEvenOdd>
CG_HD void packed_indices(const uint8_t* packed, int first, __m256i& one, __m256i& other) {
  static_assert(kWidth <= 4);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto load = [&](int bytes) {
    int word;
    memcpy(&word, packed + bytes, 4);
    return _mm256_set1_epi32(word);
  };
  if constexpr (kWidth == 4 && kEvenOdd) {
    long long words;
    memcpy(&words, packed + first / 2, 8);
    const __m256i halves = _mm256_permutevar8x32_epi32(_mm256_set1_epi64x(words), _mm256_srli_epi32(lane, 2));
    const __m256i place = _mm256_slli_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(3)), 3);
    one = _mm256_srlv_epi32(halves, place);
    other = _mm256_srli_epi32(one, 4);
  } else if constexpr (kWidth == 4) {
    const __m256i place = _mm256_slli_epi32(lane, 2);
    one = _mm256_srlv_epi32(load(first / 2), place);
    other = _mm256_srlv_epi32(load(first / 2 + 4), place);
  } else {
    const __m256i word = load(first * kWidth / 32 * 4);
    const __m256i place = _mm256_mullo_epi32(lane, _mm256_set1_epi32(kEvenOdd ? 2 * kWidth : kWidth));
    one = _mm256_srlv_epi32(word, _mm256_add_epi32(place, _mm256_set1_epi32(first * kWidth % 32)));
    other = _mm256_srli_epi32(one, kEvenOdd ? kWidth : 8 * kWidth);
  }
}
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  const __m256i* p = reinterpret_cast<const __m256i*>(codes);
  const auto zeros = [](__m256i v) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  };
  return ~(zeros(_mm256_loadu_si256(p)) | static_cast<uint64_t>(zeros(_mm256_loadu_si256(p + 1))) << 32);
}

}  // namespace cg::CG_ISA
