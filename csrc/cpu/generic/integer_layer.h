// A layer on codes: rows of codes times rows of weights, then the staircase of each sum. The set's dot.h, included
// before, multiplies.
#pragma once

#include <algorithm>
#include <cmath>

#include "dot_panel.h"

#if !defined(CG_ISA)
#include "../scalar/dot.h"
#endif

namespace cg::CG_ISA {
namespace {

// memcpy of few bytes, without a call.
CG_HD void copy_codes(uint8_t* to, const uint8_t* from, int64_t count) {
  const auto ends = [&](auto number) __attribute__((always_inline)) {
    memcpy(&number, from, sizeof(number));
    decltype(number) last;
    memcpy(&last, from + count - sizeof(last), sizeof(last));
    memcpy(to, &number, sizeof(number));
    memcpy(to + count - sizeof(last), &last, sizeof(last));
  };
  if (count > 16) memcpy(to, from, count);
  else if (count >= 8) ends(uint64_t{});
  else if (count >= 4) ends(uint32_t{});
  else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// The codes of a window: zero where it leaves the image. `image` starts at the first channel that is read.
void gather_window(const IntegerLayer& a, const uint8_t* image, int64_t y, int64_t x, uint8_t* to) {
  const int64_t count = a.channels / a.groups, line = a.kernel[1] * count;
  const int64_t first_x = x * a.stride[1] - a.padding[1];
  const bool one_run = a.groups == 1 && a.dilation[1] == 1 && first_x >= 0 && first_x + a.kernel[1] <= a.size[1];
  for (int64_t i = 0; i < a.kernel[0]; ++i, to += line) {
    const int64_t at_y = y * a.stride[0] - a.padding[0] + i * a.dilation[0];
    const uint8_t* from = image + at_y * a.size[1] * a.channels;
    if (at_y < 0 || at_y >= a.size[0]) {
      memset(to, 0, line);
    } else if (one_run) {
      copy_codes(to, from + first_x * a.channels, line);
    } else {
      for (int64_t j = 0; j < a.kernel[1]; ++j) {
        const int64_t at_x = first_x + j * a.dilation[1];
        if (at_x < 0 || at_x >= a.size[1]) memset(to + j * count, 0, count);
        else copy_codes(to + j * count, from + at_x * a.channels, count);
      }
    }
  }
}

// Rows [first, first + rows) of the codes that a group reads. What follows row_codes in each is left as it is.
void gather_rows(const IntegerLayer& a, const IntegerShape& shape, int64_t first, int64_t rows, int64_t group,
                 uint8_t* to) {
  int64_t x = first % a.out_size[1], y = first / a.out_size[1] % a.out_size[0];
  const int64_t image_codes = a.size[0] * a.size[1] * a.channels;
  const uint8_t* image =
      a.codes + first / (a.out_size[0] * a.out_size[1]) * image_codes + group * (a.channels / a.groups);
  for (int64_t r = 0; r < rows; ++r, to += shape.code_stride) {
    gather_window(a, image, y, x, to);
    if (++x < a.out_size[1]) continue;
    x = 0;
    if (++y < a.out_size[0]) continue;
    y = 0, image += image_codes;
  }
}

// Whether rows of codes are multiplied where they lie. Many rows are copied: as long as a power of two, they would
// evict each other from the caches.
bool rows_in_place(const IntegerLayer& a, const IntegerShape& shape) {
  const bool each_pixel = a.kernel[0] == 1 && a.kernel[1] == 1 && a.stride[0] == 1 && a.stride[1] == 1 &&
                          a.padding[0] == 0 && a.padding[1] == 0 && a.groups == 1;
  return each_pixel && a.rows_per_task <= 4 && shape.row_codes == shape.padded_codes;
}

// acc of all codes of some rows, in parts of a length that the caches hold.
template <int kWeightBits>
void multiply(DotPanel panel, int64_t codes) {
  constexpr int64_t kCodes = kWeightBlock * kPlanes<kWeightBits>;
  if (codes == 0) return;
  const int64_t rows = std::clamp(panel.rows, kMinPanelRows, kMaxPanelRows);
  const int64_t parts = IntegerShape::parts(codes * rows, kPanelBytes);
  const int64_t blocks = IntegerShape::parts(IntegerShape::parts(codes, parts), kCodes);
  for (int64_t left = codes / kCodes; left > 0; left -= blocks) {
    panel.blocks = std::min(left, blocks);
    dot_panel<kWeightBits>(panel);
    panel.codes += panel.blocks * kCodes;
    panel.weights += panel.blocks * kWeightBlock;
  }
}

// Compilers vectorize the loops below.
void store_floats(const IntegerLayer& a, const int32_t* acc, int64_t first, int64_t count, float* out) {
  const float *scale = a.scale + first, *offset = a.offset + first;
  for (int64_t i = 0; i < count; ++i) out[i] = mul(static_cast<float>(acc[i]), scale[i]) + offset[i];
}

void store_codes(const IntegerLayer& a, const int32_t* acc, int64_t first, int64_t count, uint8_t* out) {
  const float *scale = a.scale + first, *offset = a.offset + first;
  const float levels = static_cast<float>(a.levels);
  for (int64_t i = 0; i < count; ++i) {
    const float code = ceil(mul(static_cast<float>(acc[i]), scale[i]) + offset[i]);
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(min_of(max_of(code, 0.0f), levels)));
  }
}

void store_codes_by_thresholds(const IntegerLayer& a, const int32_t* acc, int64_t first, int64_t count, uint8_t* out) {
  const int32_t* thresholds = a.thresholds + first * a.levels;
  for (int64_t i = 0; i < count; ++i, thresholds += a.levels) {
    int code = 0;
    for (int k = 0; k < a.levels; ++k) code += acc[i] >= thresholds[k];
    out[i] = static_cast<uint8_t>(code);
  }
}

void integer_layer(const IntegerLayer& a, int64_t begin, int64_t end, uint8_t* scratch) {
  const IntegerShape shape(a);
  const bool in_place = rows_in_place(a, shape);
  uint8_t* const gathered = scratch;
  int32_t* const acc = reinterpret_cast<int32_t*>(scratch + a.rows_per_task * shape.code_stride);
  for (int64_t r = 0; r < a.rows_per_task && !in_place; ++r) {
    memset(gathered + r * shape.code_stride + shape.row_codes, 0, shape.padded_codes - shape.row_codes);
  }
  for (int64_t task = begin; task < end; ++task) {
    // Tasks in turn read the same weights.
    const int64_t first_row = task % shape.row_tasks * a.rows_per_task, of_channels = task / shape.row_tasks;
    const int64_t first = of_channels % shape.channel_tasks * a.channels_per_task;
    const int64_t group = of_channels / shape.channel_tasks, channel = group * shape.group_channels + first;
    const int64_t rows = std::min(a.rows_per_task, shape.rows - first_row);
    const int64_t channels = std::min(a.channels_per_task, shape.group_channels - first);
    if (!in_place) gather_rows(a, shape, first_row, rows, group, gathered);
    memset(acc, 0, rows * channels * sizeof(int32_t));
    const DotPanel panel{in_place ? a.codes + first_row * shape.row_codes : gathered,
                         in_place ? shape.padded_codes : shape.code_stride,
                         rows,
                         a.bits,
                         a.weight + channel * a.row_bytes,
                         a.row_bytes,
                         channels,
                         0,
                         acc,
                         channels};
    with_width(a.weight_bits, [&](auto bits) { multiply<bits.value>(panel, shape.padded_codes); });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (first_row + r) * a.out_channels + channel;
      const int32_t* sums = acc + r * channels;
      if (!a.out_codes) store_floats(a, sums, channel, channels, a.out + at);
      else if (a.thresholds) store_codes_by_thresholds(a, sums, channel, channels, a.out_codes + at);
      else store_codes(a, sums, channel, channels, a.out_codes + at);
    }
  }
}

}  // namespace
}  // namespace cg::CG_ISA
