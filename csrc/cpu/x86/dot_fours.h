// Products of bytes by vpdpbusd, which adds four to a 32-bit number. The set's dot.h names the instruction.
#pragma once

#include "dot.h"

#if !defined(CG_DPBUSD)
#define CG_DPBUSD _mm256_dpbusd_avx_epi32
#endif

namespace cg::CG_ISA {
namespace {

struct FourProducts {
  static constexpr bool kNarrow = false, kWide = false;
  static int64_t blocks_at_once(int, int, int64_t blocks) { return blocks; }
  static CG_HD Register add(Register sums, Register codes, Register weights) { return CG_DPBUSD(sums, codes, weights); }
};

}  // namespace
}  // namespace cg::CG_ISA
