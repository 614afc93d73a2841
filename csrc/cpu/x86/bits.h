// Codes of a byte each to kWidth bits each (math/bits.h) and back, a register at a time.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/registers.h"
#endif

namespace cg::CG_ISA {

// A sum of products joins neighbouring fields, two at a time.
template <int kWidth>
CG_HD void bitpack_register(Register codes, uint8_t* packed) {
  if constexpr (kWidth == 1) {
    store_low_bits(packed, codes);
  } else if constexpr (kWidth == 2) {
    const Register words = CG_MM(maddubs_epi16)(codes, CG_MM(set1_epi16)(0x0401));
    store_bytes_of_dwords(packed, CG_MM(madd_epi16)(words, CG_MM(set1_epi32)(0x00100001)));
  } else if constexpr (kWidth == 4) {
    store_bytes_of_words(packed, CG_MM(maddubs_epi16)(codes, CG_MM(set1_epi16)(0x1001)));
  } else {
    store_register(packed, codes);
  }
}
template <int kWidth>
CG_HD Register bitunpack_register(const uint8_t* packed) {
  if constexpr (kWidth == 1) {
    return load_bits_as_bytes(packed);
  } else if constexpr (kWidth == 2) {
    const Register bytes = CG_MM(cvtepu8_epi32)(load_quarter(packed)), halves = bytes | CG_MM(slli_epi32)(bytes, 12);
    return (halves | CG_MM(slli_epi32)(halves, 6)) & CG_MM(set1_epi8)(3);
  } else if constexpr (kWidth == 4) {
    const Register bytes = CG_MM(cvtepu8_epi16)(load_half(packed));
    return (bytes | CG_MM(slli_epi16)(bytes, 4)) & CG_MM(set1_epi8)(15);
  } else {
    return load_register(packed);
  }
}

// 64 codes.
template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  constexpr int kStep = sizeof(Register);
  for (int i = 0; i < 64; i += kStep) bitpack_register<kWidth>(load_stored_codes(codes + i), packed + i * kWidth / 8);
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  constexpr int kStep = sizeof(Register);
  for (int i = 0; i < 64; i += kStep) store_register(codes + i, bitunpack_register<kWidth>(packed + i * kWidth / 8));
}

}  // namespace cg::CG_ISA
