#pragma once

#include "../avx512/bytes.h"

#define CG_DPBUSD _mm512_dpbusd_epi32
#include "../x86/dot_columns.h"
#include "../x86/dot_fours.h"

namespace cg::CG_ISA {
namespace {

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  dot_panel_by<FourProducts, kWeightBits>(a);
}

void dot_columns(const ColumnPanel& a) { dot_columns_by<FourProducts>(a); }

}  // namespace
}  // namespace cg::CG_ISA
