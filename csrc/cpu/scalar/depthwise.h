// Windows of channels by themselves, a pixel at a time.
#pragma once

#if !defined(CG_ISA)
#define CG_ISA scalar
#endif
#include "../generic/depthwise.h"

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

void unpack_row(const uint8_t* packed, int64_t bytes, int bits, uint8_t* to) {
  with_width(bits, [&](auto width) {
    for (int64_t at = 0; at < bytes; at += kWeightBlock, to += kWeightBlock * kPlanes<width.value>) {
      unpack_block<width.value>(packed + at, reinterpret_cast<int8_t*>(to));
    }
  });
}

struct PlainWindow {
  static constexpr int64_t kPixels = 1;

  static int64_t place(int64_t i) { return i; }
  static void dot_wide(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pixels,
                       int32_t* sums) {
    int32_t wide[32] = {};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* const v = codes + offsets[pixel];
      const int8_t* const w = reinterpret_cast<const int8_t*>(weights) + pixel * 32;
      for (int i = 0; i < 32; ++i) wide[i] += v[i] * w[i];
    }
    memcpy(sums, wide, sizeof(wide));
  }
};

using Depthwise = DepthwiseBy<PlainWindow>;

}  // namespace
}  // namespace cg::scalar
