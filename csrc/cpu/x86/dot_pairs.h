// Products of bytes by vpmaddubsw, which adds two to a signed 16-bit number and saturates; and where they do not fit.
#pragma once

#include "dot.h"
#include "dot_columns.h"

namespace cg::CG_ISA {
namespace {

// As many registers of products are added in 16 bits as cannot overflow.
struct NarrowProducts {
  static constexpr bool kNarrow = true, kWide = false;
  static int64_t blocks_at_once(int planes, int bits, int64_t) {
    return kBlocks * (32767 / (2 * ((1 << bits) - 1) * 128) / planes);
  }
  static CG_HD Register add(Register sums, Register codes, Register weights) {
    return CG_MM(add_epi16)(sums, CG_MM(maddubs_epi16)(codes, weights));
  }
  static CG_HD Register widen(Register sums, Register narrow) {
    return CG_MM(add_epi32)(sums, CG_MM(madd_epi16)(narrow, CG_MM(set1_epi16)(1)));
  }
};

// Across channels: a number of them that the compiler knows.
template <int kCount>
struct SomeNarrowProducts : NarrowProducts {
  static constexpr int kAtOnce = kCount;
  static CG_HD Register multiply(Register codes, Register weights) { return CG_MM(maddubs_epi16)(codes, weights); }
};

// Codes of up to 7 bits: two products fit.
struct PairProducts {
  static constexpr bool kNarrow = false, kWide = false;
  static int64_t blocks_at_once(int, int, int64_t blocks) { return blocks; }
  static CG_HD Register add(Register sums, Register codes, Register weights) {
    return NarrowProducts::widen(sums, CG_MM(maddubs_epi16)(codes, weights));
  }
};

// Codes of 8 bits: vpmaddwd, of numbers of 16 bits, adds two products in 32.
struct WideProducts {
  static constexpr bool kNarrow = false, kWide = true;
  static int64_t blocks_at_once(int, int, int64_t blocks) { return blocks; }
  static CG_HD Register add(Register sums, Register codes, Register weights) {
    return CG_MM(add_epi32)(sums, in_register(CG_MM(madd_epi16)(codes, weights)));
  }
};

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  if (a.bits == 8) dot_panel_by<WideProducts, kWeightBits>(a);
  else if (NarrowProducts::blocks_at_once(kPlanes<kWeightBits>, a.bits, a.blocks) == 0)
    dot_panel_by<PairProducts, kWeightBits>(a);
  else dot_panel_by<NarrowProducts, kWeightBits>(a);
}

void dot_columns(const ColumnPanel& a) {
  const int at_once = 32767 / (2 * ((1 << a.bits) - 1) * (1 << (a.weight_bits - 1)));
  if (at_once >= 8) dot_columns_by<SomeNarrowProducts<8>>(a);
  else if (at_once >= 4) dot_columns_by<SomeNarrowProducts<4>>(a);
  else if (at_once >= 2) dot_columns_by<SomeNarrowProducts<2>>(a);
  else if (at_once == 1) dot_columns_by<PairProducts>(a);
  else dot_columns_by<WideProducts>(a);
}

}  // namespace
}  // namespace cg::CG_ISA
