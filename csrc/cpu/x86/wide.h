// Codes and weights in 16 bits.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/bytes.h"
#endif
#include "../../dispatch.h"

namespace cg::CG_ISA {
namespace {

CG_HD Register widen_codes(HalfRegister codes) { return CG_MM(cvtepu8_epi16)(codes); }
CG_HD Register widen_weights(HalfRegister weights) { return CG_MM(cvtepi8_epi16)(weights); }

// Four codes at a time: what follows them is not read.
CG_HD void widen_codes(const uint8_t* from, int64_t quads, uint8_t* to) {
  const auto widen = [&](auto chunks) __attribute__((always_inline)) {
    for (int i = 0; i < chunks.value; ++i, from += 16, to += 32) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepu8_epi16(codes));
    }
    quads -= 4 * chunks.value;
  };
  while (quads >= 16) widen(Constant<4>{});
  while (quads >= 4) widen(Constant<1>{});
  for (; quads > 0; --quads, from += 4, to += 8) {
    int32_t four;
    memcpy(&four, from, sizeof(four));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
  }
}
CG_HD void widen_weights(const uint8_t* from, int64_t bytes, uint8_t* to) {  // a multiple of a register's
  constexpr int64_t kHalf = sizeof(HalfRegister);
#pragma GCC unroll 4
  for (int64_t at = 0; at < bytes; at += kHalf) store_register(to + 2 * at, widen_weights(load_half(from + at)));
}

}  // namespace
}  // namespace cg::CG_ISA
