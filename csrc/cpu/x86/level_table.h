// Packed codes to levels: what both widths of a register do alike.
#pragma once

#if !defined(CG_ISA)
#include "../avx2/compare_key.h"
#endif
#include "../generic/level_table.h"

namespace cg::CG_ISA {

CG_HD void store_or_stream(void* to, Register v, bool stream) {
  if (stream) stream_register(to, v);
  else store_register(to, v);
}

template <>
struct LevelTable<float, 2> {
  static constexpr bool kServed = true;
  SmallTable<Floats> table;
  CG_HD LevelTable(const float* levels, float) : table(levels, 4) {}
  CG_HD void store(const uint8_t* packed, float* y, bool stream) const {
    for (int i = 0; i < 64; i += 2 * Lanes<Floats>::kCount) {
      store_pair(y + i, weights_of<false>(packed, table, i), stream);
    }
  }
};

// Products, two registers of even and odd places; if no level is a tie, rounded in a quarter of the instructions.
template <>
struct LevelTable<bf16, 8> {
  static constexpr bool kServed = true;
  Floats alpha;
  bool ties_up = true;
  CG_HD LevelTable(const bf16* levels, float step) : alpha(step) {
    uint8_t codes[256];
    bf16 made[256];
    for (int k = 0; k < 256; ++k) codes[k] = static_cast<uint8_t>(k);
    for (int k = 0; k < 256; k += 64) store(codes + k, made + k, false);
    ties_up = memcmp(made, levels, sizeof(made)) == 0;
  }
  template <bool kTiesToEven>
  CG_HD Register at(const uint8_t* codes) const {
    const Register words = CG_MM(cvtepu8_epi16)(load_half(codes));
    const Floats even = CG_MM(cvtepi32_ps)(words & CG_MM(set1_epi32)(0xffff));
    const Floats odd = CG_MM(cvtepi32_ps)(CG_MM(srli_epi32)(words, 16));
    return join<bf16, kTiesToEven>({mul(even, alpha), mul(odd, alpha)});
  }
  CG_HD void store(const uint8_t* codes, bf16* y, bool stream) const {
    constexpr int kStep = sizeof(Register) / sizeof(bf16);
    if (ties_up) {
      for (int i = 0; i < 64; i += kStep) store_or_stream(y + i, at<false>(codes + i), stream);
    } else {
      for (int i = 0; i < 64; i += kStep) store_or_stream(y + i, at<true>(codes + i), stream);
    }
  }
};

}  // namespace cg::CG_ISA
