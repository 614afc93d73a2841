// Products of codes and weights of each channel by itself. A set's Window multiplies 32 channels of the window of an
// output pixel, a step of some of its pixels at a time.
#pragma once

#include <algorithm>

#include "dot_panel.h"
#include "unpack_row.h"

namespace cg::CG_ISA {
namespace {

// What integer_layer.h wants of a set that multiplies channels by themselves. Of a Window:
//   kPixels: of a step
//   place(i): where channel i of 32 is among the weights of a step, its pixels in turn
//   dot_wide(...): the sums of 32 channels, in 32 bits
//   dot_narrow(...), which it may have: the same of codes of up to kNarrowBits, with the sums of some steps in 16 bits
template <class Window>
struct DepthwiseBy {
  static constexpr bool kAdds = false;  // to acc: it is written
  static constexpr int64_t kChannels = 32, kStepBytes = kChannels * Window::kPixels;
  static_assert(kChannels <= ColumnShape::kMaxChannels && Window::kPixels <= ColumnShape::kMaxPixels);

  static int64_t steps(const IntegerLayer& a) {
    return IntegerShape::parts(a.kernel[0] * a.kernel[1], Window::kPixels);
  }

  // Whose sums do. One alone would only have to be widened.
  static int64_t steps_in_16_bits(const IntegerLayer& a) {
    const int64_t count = 32767 / (Window::kPixels * ((1 << a.bits) - 1) * (1 << (a.weight_bits - 1)));
    return count > 1 && a.bits <= Window::kNarrowBits ? count : 0;
  }

  // Where in the window the pixels of each step are, and [channels / 32, steps, kStepBytes] weights.
  static void order(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* weights, int64_t channels,
                    uint8_t* unpacked, uint8_t* to) {
    const int64_t pixels = a.kernel[0] * a.kernel[1], step_count = steps(a);
    int64_t* const offsets = reinterpret_cast<int64_t*>(to);
    for (int64_t i = 0; i < Window::kPixels * step_count; ++i) {
      const int64_t pixel = std::min(i, pixels - 1);
      offsets[i] = pixel / a.kernel[1] * shape.piece_stride + pixel % a.kernel[1] * a.dilation[1] * a.channels;
    }
    to += shape.offset_bytes;
    memset(to, 0, IntegerShape::parts(channels, kChannels) * step_count * kStepBytes);
    for (int64_t c = 0; c < channels; ++c) {
      unpack_row(weights + c * a.row_bytes, a.row_bytes, a.weight_bits, unpacked);
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const int64_t step = c / kChannels * step_count + pixel / Window::kPixels;
        to[step * kStepBytes + Window::place(c % kChannels) + pixel % Window::kPixels] = unpacked[pixel];
      }
    }
  }

  static void dot(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* const* row, int64_t rows,
                  const uint8_t* weights, int64_t channels, int32_t* acc, int64_t acc_stride) {
    const int64_t* const offsets = reinterpret_cast<const int64_t*>(weights);
    const int64_t step_count = steps(a);
    weights += shape.offset_bytes;
    const auto each = [&](const auto& dot) __attribute__((always_inline)) {
      for (int64_t channel = 0; channel < channels; channel += kChannels, weights += step_count * kStepBytes) {
        for (int64_t r = 0; r < rows; ++r) dot(row[r] + channel, acc + r * acc_stride + channel);
      }
    };
    if constexpr (requires { Window::dot_narrow; }) {
      if (const int64_t together = steps_in_16_bits(a); together > 0) {
        return each([&](const uint8_t* codes, int32_t* sums) __attribute__((always_inline)) {
          Window::dot_narrow(codes, offsets, weights, step_count, together, sums);
        });
      }
    }
    each([&](const uint8_t* codes, int32_t* sums)
             __attribute__((always_inline)) { Window::dot_wide(codes, offsets, weights, step_count, sums); });
  }
};

}  // namespace
}  // namespace cg::CG_ISA
