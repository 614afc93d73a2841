// The saved bits of a block, masks and 2-bit states, as words, from which mask registers are loaded.
#pragma once

#include "vec.h"

#include "../generic/word_masks.h"
#include "../x86/bits.h"

namespace cg::avx512 {

// Every machine with AVX-512 has these as one fast instruction.
CG_HD uint64_t spread_bits(uint64_t v) { return _pdep_u64(v, 0x5555555555555555u); }
CG_HD uint64_t unspread_bits(uint64_t v) { return _pext_u64(v, 0x5555555555555555u); }

using BlockBits = uint64_t;
struct BlockStates : WordStates {
  explicit CG_HD BlockStates(const uint8_t* packed) : WordStates(packed, [](uint64_t v) { return unspread_bits(v); }) {}
};

template <int kCount, class U>
CG_HD void masked_copy(const U* from, U* to, uint64_t bits, int first, bool stream, bool /*cached*/ = false) {
  for (int i = first; i < first + kCount; i += 64 / static_cast<int>(sizeof(U))) {
    __m512i v;
    if constexpr (sizeof(U) == 2) v = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits >> i), from + i);
    else if constexpr (sizeof(U) == 4) v = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits >> i), from + i);
    else v = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(bits >> i), from + i);
    if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), v);
    else _mm512_storeu_si512(to + i, v);
  }
}

CG_HD Pair<Floats> load_pair_where(const bf16* block, uint64_t bits, int first) {
  return split<bf16>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits >> first), block + first));
}

// By halves: a whole register loaded just after it was stored waits too.
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  const __m256i* p = reinterpret_cast<const __m256i*>(codes);
  const __m256i low = _mm256_loadu_si256(p), high = _mm256_loadu_si256(p + 1);
  return _mm256_test_epi8_mask(low, low) | static_cast<uint64_t>(_mm256_test_epi8_mask(high, high)) << 32;
}

}  // namespace cg::avx512
