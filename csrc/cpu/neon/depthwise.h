// Windows of channels by themselves, a pixel at a time.
#pragma once

#include "unpack_weights.h"

#include "../generic/depthwise.h"

namespace cg::neon {
namespace {

struct PixelWindow {
  static constexpr int64_t kPixels = 1;
  static constexpr int kNarrowBits = 7;  // of a signed byte

  static int64_t place(int64_t i) { return i; }

  static CG_HD void dot_narrow(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pixels,
                               int64_t together, int32_t* sums) {
    int32x4_t wide[8];
    for (int32x4_t& sum : wide) sum = vdupq_n_s32(0);
    for (int64_t pixel = 0; pixel < pixels;) {
      int16x8_t narrow[4];
      for (int16x8_t& sum : narrow) sum = vdupq_n_s16(0);
      for (const int64_t end = std::min(pixel + together, pixels); pixel < end; ++pixel) {
        for (int i = 0; i < 2; ++i) {
          const int8x16_t v = load<int8x16_t>(codes + offsets[pixel] + 16 * i);
          const int8x16_t w = load<int8x16_t>(weights + pixel * 32 + 16 * i);
          narrow[2 * i] = vmlal_s8(narrow[2 * i], vget_low_s8(v), vget_low_s8(w));
          narrow[2 * i + 1] = vmlal_high_s8(narrow[2 * i + 1], v, w);
        }
      }
      for (int i = 0; i < 4; ++i) {
        wide[2 * i] = vaddw_s16(wide[2 * i], vget_low_s16(narrow[i]));
        wide[2 * i + 1] = vaddw_high_s16(wide[2 * i + 1], narrow[i]);
      }
    }
    for (int i = 0; i < 8; ++i) store(sums + 4 * i, wide[i]);
  }

  static CG_HD void dot_wide(const uint8_t* codes, const int64_t* offsets, const uint8_t* weights, int64_t pixels,
                             int32_t* sums) {
    int32x4_t wide[8];
    for (int32x4_t& sum : wide) sum = vdupq_n_s32(0);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int i = 0; i < 4; ++i) {
        const int16x8_t v = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(codes + offsets[pixel] + 8 * i)));
        const int16x8_t w = vmovl_s8(vreinterpret_s8_u8(vld1_u8(weights + pixel * 32 + 8 * i)));
        wide[2 * i] = vmlal_s16(wide[2 * i], vget_low_s16(v), vget_low_s16(w));
        wide[2 * i + 1] = vmlal_high_s16(wide[2 * i + 1], v, w);
      }
    }
    for (int i = 0; i < 8; ++i) store(sums + 4 * i, wide[i]);
  }
};

using Depthwise = DepthwiseBy<PixelWindow>;

}  // namespace
}  // namespace cg::neon
