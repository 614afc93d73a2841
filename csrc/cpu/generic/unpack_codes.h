// Packed codes to one per byte.
#pragma once

#include "blocks.h"

namespace cg::CG_ISA {
namespace {

void unpack_codes(const UnpackCodes& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int count = block_count(a.count, block);
    uint8_t copy[kBlock];
    uint8_t* codes = count == kBlock ? a.codes + block * kBlock : copy;
    read_codes(a.packed, block, count, packed_width(a.bits), codes);
    if (count < kBlock) memcpy(a.codes + block * kBlock, copy, count);
  }
}

}  // namespace
}  // namespace cg::CG_ISA
