// A block's saved bits (1-bit masks and 2-bit states) as lane masks: a shuffle selects a register's bytes and each lane
// tests its own bit.
#pragma once

#include "vec.h"

#include "../x86/bits.h"

namespace cg::avx2 {

// A block's bits, in both halves of a register for the shuffle.
struct BlockBits {
  __m256i all;
  explicit CG_HD BlockBits(uint64_t bits) : all(_mm256_set1_epi64x(static_cast<long long>(bits))) {}

  // The mask of a vector of elements of kBytes each that begins at element `first`.
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

// The same for one bit of each 2-bit state.
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

// A masked load, which Zen 3's hardware prefetcher ignores: it would fetch a second time what prefetch() has asked for.
CG_HD __m256i load_without_prefetch(const void* from) {
  __m256i all = _mm256_set1_epi32(-1);
  asm("" : "+x"(all));  // else the compiler makes it a plain load
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

CG_HD Floats masked(Floats v, __m256i mask) { return _mm256_and_ps(v.v, _mm256_castsi256_ps(mask)); }
CG_HD Doubles masked(Doubles v, __m256i mask) { return _mm256_and_pd(v.v, _mm256_castsi256_pd(mask)); }

template <class T, class Bits>
CG_HD auto load_where(const T* block, Bits bits, int first) {
  return masked(Io<T>::load(block + first), bits.template mask<sizeof(compute_t<T>)>(first));
}
template <class Bits>
CG_HD Pair<Floats> load_pair_where(const bf16* block, Bits bits, int first) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + first));
  return split<bf16>(_mm256_and_si256(bits.template mask<2>(first), v));
}

CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  const __m256i* p = reinterpret_cast<const __m256i*>(codes);
  const auto zeros = [](__m256i v) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  };
  return ~(zeros(_mm256_loadu_si256(p)) | static_cast<uint64_t>(zeros(_mm256_loadu_si256(p + 1))) << 32);
}

}  // namespace cg::avx2
