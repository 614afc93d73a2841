// Products of rows of codes and weights, one block at a time.
#pragma once

#include "../generic/dot_panel.h"
#if !defined(CG_ISA)
#define CG_ISA scalar
#endif

namespace cg::scalar {
namespace {

template <int kWeightBits>
void unpack_block(const uint8_t* packed, int8_t* weights) {
  for (int p = 0; p < kPlanes<kWeightBits>; ++p) {
    for (int j = 0; j < kWeightBlock; ++j) {
      const int field = packed[j] >> (p * kWeightBits) & ((1 << kWeightBits) - 1);
      const int top = 1 << (kWeightBits - 1);
      weights[p * kWeightBlock + j] = static_cast<int8_t>(kWeightBits == 1 ? 2 * field - 1 : (field ^ top) - top);
    }
  }
}

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int64_t block = 0; block < a.blocks; ++block) {
      int8_t weights[kCodes];
      unpack_block<kWeightBits>(a.weights + c * a.weight_stride + block * kWeightBlock, weights);
      for (int64_t r = 0; r < a.rows; ++r) {
        const uint8_t* codes = a.codes + r * a.code_stride + block * kCodes;
        int32_t sum = 0;
        for (int64_t k = 0; k < kCodes; ++k) sum += codes[k] * weights[k];
        a.acc[r * a.acc_stride + c] += sum;
      }
    }
  }
}

using Columns = NoColumns;
using Depthwise = NoColumns;

}  // namespace
}  // namespace cg::scalar
