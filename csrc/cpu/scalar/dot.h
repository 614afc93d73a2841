// Products of rows of codes and weights, one block at a time.
#pragma once

#include "depthwise.h"

namespace cg::scalar {
namespace {

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

}  // namespace
}  // namespace cg::scalar
