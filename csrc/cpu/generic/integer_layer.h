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

// `pixels` of an image's line, from x on: zero outside the image, which starts at the first channel that is read.
void copy_line(const IntegerLayer& a, const uint8_t* image, int64_t y, int64_t x, int64_t pixels, uint8_t* to) {
  const int64_t count = a.channels / a.groups, width = a.size[1];
  if (y < 0 || y >= a.size[0]) {
    memset(to, 0, pixels * count);
    return;
  }
  const int64_t begin = std::clamp<int64_t>(-x, 0, pixels), end = std::clamp(width - x, begin, pixels);
  const uint8_t* from = image + (y * width + x + begin) * a.channels;
  if (begin > 0) memset(to, 0, begin * count);
  if (a.groups == 1) {
    copy_codes(to + begin * count, from, (end - begin) * count);
  } else {
    for (int64_t i = begin; i < end; ++i, from += a.channels) copy_codes(to + i * count, from, count);
  }
  if (end < pixels) memset(to + end * count, 0, (pixels - end) * count);
}

// The codes of a window: zero where it leaves the image.
void gather_window(const IntegerLayer& a, const uint8_t* image, int64_t y, int64_t x, uint8_t* to) {
  const int64_t runs = a.dilation[1] == 1 ? 1 : a.kernel[1], pixels = a.kernel[1] / runs;
  const int64_t run = pixels * (a.channels / a.groups), first_x = x * a.stride[1] - a.padding[1];
  for (int64_t i = 0; i < a.kernel[0]; ++i) {
    const int64_t at_y = y * a.stride[0] - a.padding[0] + i * a.dilation[0];
    for (int64_t j = 0; j < runs; ++j, to += run) copy_line(a, image, at_y, first_x + j * a.dilation[1], pixels, to);
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

// Of few rows, by thresholds as they lie.
void store_codes_by_thresholds(const IntegerLayer& a, const int32_t* acc, int64_t first, int64_t count, uint8_t* out) {
  const int32_t* thresholds = a.thresholds + first * a.levels;
  for (int64_t i = 0; i < count; ++i, thresholds += a.levels) {
    int code = 0;
    for (int k = 0; k < a.levels; ++k) code += acc[i] >= thresholds[k];
    out[i] = static_cast<uint8_t>(code);
  }
}

// body(i, v) sets v to the outputs of kStored channels, the i-th and the next, in a loop that compilers vectorize.
template <class T, class Body>
CG_HD void store_outputs(int64_t count, T* out, const Body& body) {
  constexpr int64_t kStored = IntegerShape::kStored;
  for (int64_t i = 0; i < count; i += kStored) {
    T v[kStored];
    body(i, v);
    copy_codes(reinterpret_cast<uint8_t*>(out + i), reinterpret_cast<const uint8_t*>(v),
               std::min(kStored, count - i) * static_cast<int64_t>(sizeof(T)));
  }
}

// The outputs of a thread's tasks, from sums. The numbers that they take are copied, so that all loops over channels
// are equally long: room has output_bytes for them.
class Outputs {
 public:
  Outputs(const IntegerLayer& a, const IntegerShape& shape, uint8_t* room)
      : a_(a),
        ordered_(shape.orders_thresholds(a)),
        thresholds_(reinterpret_cast<int32_t*>(room)),
        scale_(reinterpret_cast<float*>(room)),
        offset_(scale_ + IntegerShape::rounded(a.channels_per_task, kStored)) {}

  // Of rows [row, row + rows) and some channels. Each row of acc has a multiple of kStored sums.
  void store(const int32_t* acc, int64_t stride, int64_t row, int64_t rows, int64_t channel, int64_t channels) {
    if (channel != first_) order(first_ = channel, channels);
    for (int64_t r = 0; r < rows; ++r, acc += stride) {
      const int64_t at = (row + r) * a_.out_channels + channel;
      if (!a_.out_codes) floats(acc, channels, a_.out + at);
      else if (ordered_) codes_by_thresholds(acc, channels, a_.out_codes + at);
      else if (a_.thresholds) store_codes_by_thresholds(a_, acc, channel, channels, a_.out_codes + at);
      else codes(acc, channels, a_.out_codes + at);
    }
  }

 private:
  static constexpr int kStored = IntegerShape::kStored;

  void order(int64_t first, int64_t channels) {
    const int64_t rounded = IntegerShape::rounded(channels, kStored);
    const auto copy = [&](const float* from, float* to) {
      memcpy(to, from + first, channels * sizeof(float));
      std::fill(to + channels, to + rounded, 0.0f);
    };
    if (!a_.thresholds) copy(a_.scale, scale_), copy(a_.offset, offset_);
    for (int64_t c = 0; c < rounded && ordered_; ++c) {  // [channels / kStored, levels, kStored]
      const int32_t* from = a_.thresholds + (first + std::min(c, channels - 1)) * a_.levels;
      int32_t* to = thresholds_ + c / kStored * kStored * a_.levels + c % kStored;
      for (int k = 0; k < a_.levels; ++k) to[k * kStored] = from[k];
    }
  }

  float affine(const int32_t* acc, int64_t i) const { return mul(static_cast<float>(acc[i]), scale_[i]) + offset_[i]; }
  void floats(const int32_t* acc, int64_t count, float* out) const {
    store_outputs(count, out, [&](int64_t i, float (&v)[kStored]) __attribute__((always_inline)) {
      for (int j = 0; j < kStored; ++j) v[j] = affine(acc, i + j);
    });
  }
  void codes(const int32_t* acc, int64_t count, uint8_t* out) const {
    const float levels = static_cast<float>(a_.levels);
    store_outputs(count, out, [&](int64_t i, uint8_t (&v)[kStored]) __attribute__((always_inline)) {
      int32_t code[kStored];
      for (int j = 0; j < kStored; ++j) {
        code[j] = static_cast<int32_t>(min_of(max_of(ceil(affine(acc, i + j)), 0.0f), levels));
      }
      for (int j = 0; j < kStored; ++j) v[j] = static_cast<uint8_t>(code[j]);
    });
  }
  void codes_by_thresholds(const int32_t* acc, int64_t count, uint8_t* out) const {
    const int32_t* thresholds = thresholds_;
    store_outputs(count, out, [&](int64_t i, uint8_t (&v)[kStored]) __attribute__((always_inline)) {
      int32_t code[kStored] = {};
      for (int k = 0; k < a_.levels; ++k, thresholds += kStored) {
        for (int j = 0; j < kStored; ++j) code[j] += acc[i + j] >= thresholds[j];
      }
      for (int j = 0; j < kStored; ++j) v[j] = static_cast<uint8_t>(code[j]);
    });
  }

  const IntegerLayer& a_;
  const bool ordered_;
  int32_t* const thresholds_;
  float *const scale_, *const offset_;  // in the same room
  int64_t first_ = -1;                  // the channel with which the numbers begin
};

// body(row, rows, group, channel, channels, block) for each task; those in turn have the same channels, the block-th.
template <class Body>
void for_each_task(const IntegerLayer& a, const IntegerShape& shape, int64_t begin, int64_t end, const Body& body) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task % shape.row_tasks * a.rows_per_task, block = task / shape.row_tasks;
    const int64_t first = block % shape.channel_tasks * a.channels_per_task, group = block / shape.channel_tasks;
    body(row, std::min(a.rows_per_task, shape.rows - row), group, group * shape.group_channels + first,
         std::min(a.channels_per_task, shape.group_channels - first), block);
  }
}

void layer_by_rows(const IntegerLayer& a, int64_t begin, int64_t end, uint8_t* scratch) {
  const IntegerShape shape(a);
  const bool in_place = rows_in_place(a, shape);
  Outputs outputs(a, shape, scratch);
  uint8_t* const gathered = scratch += shape.output_bytes(a);
  int32_t* const acc = reinterpret_cast<int32_t*>(scratch + a.rows_per_task * shape.code_stride);
  for (int64_t r = 0; r < a.rows_per_task && !in_place; ++r) {
    memset(gathered + r * shape.code_stride + shape.row_codes, 0, shape.padded_codes - shape.row_codes);
  }
  for_each_task(a, shape, begin, end,
                [&](int64_t row, int64_t rows, int64_t group, int64_t channel, int64_t channels, int64_t) {
                  if (!in_place) gather_rows(a, shape, row, rows, group, gathered);
                  const int64_t stride = IntegerShape::rounded(channels, IntegerShape::kStored);
                  memset(acc, 0, rows * stride * sizeof(int32_t));
                  const DotPanel panel{in_place ? a.codes + row * shape.row_codes : gathered,
                                       in_place ? shape.padded_codes : shape.code_stride,
                                       rows,
                                       a.bits,
                                       a.weight + channel * a.row_bytes,
                                       a.row_bytes,
                                       channels,
                                       0,
                                       acc,
                                       stride};
                  with_width(a.weight_bits, [&](auto bits) { multiply<bits.value>(panel, shape.padded_codes); });
                  outputs.store(acc, stride, row, rows, channel, channels);
                });
}

// Where the windows of rows [first, first + rows) start: in the image, or in a copy of the lines that they are in.
void point_rows(const IntegerLayer& a, const ColumnShape& shape, int64_t first, int64_t rows, int64_t group,
                uint8_t* copies, const uint8_t** to) {
  const int64_t pixel = a.channels / a.groups, height = a.out_size[0], width = a.out_size[1];
  if (!shape.in_lines) {
    gather_rows(a, shape, first, rows, group, copies);
    for (int64_t r = 0; r < rows; ++r) to[r] = copies + r * shape.code_stride;
    return;
  }
  while (rows > 0) {
    const int64_t x = first % width, y = first / width % height, count = std::min(rows, width - x);
    const uint8_t* image = a.codes + first / (width * height) * (a.size[0] * a.size[1] * a.channels) + group * pixel;
    const uint8_t* window = copies;
    int64_t step = a.stride[1] * pixel;
    if (shape.in_place) {
      window = image + (y * a.stride[0] * a.size[1] + x * a.stride[1]) * a.channels;
      step = a.stride[1] * a.channels;
    } else {
      const int64_t pixels = (count - 1) * a.stride[1] + shape.reach;
      for (int64_t i = 0; i < a.kernel[0]; ++i, copies += shape.piece_stride) {
        copy_line(a, image, y * a.stride[0] - a.padding[0] + i * a.dilation[0], x * a.stride[1] - a.padding[1], pixels,
                  copies);
      }
    }
    for (int64_t i = 0; i < count; ++i, window += step) *to++ = window;
    first += count, rows -= count;
  }
}

template <class Set>
void layer_by_columns(const IntegerLayer& a, int64_t begin, int64_t end, uint8_t* scratch) {
  const ColumnShape shape(a);
  Outputs outputs(a, shape, scratch);
  scratch += shape.output_bytes(a);
  const uint8_t** const row_codes = reinterpret_cast<const uint8_t**>(scratch);
  int32_t* const acc = reinterpret_cast<int32_t*>(scratch + shape.acc);
  int64_t ordered = -1;  // the block of channels whose weights are
  for_each_task(a, shape, begin, end,
                [&](int64_t row, int64_t rows, int64_t group, int64_t channel, int64_t channels, int64_t block) {
                  if (block != ordered) {
                    Set::order(a, shape, a.weight + channel * a.row_bytes, channels, scratch + shape.unpacked,
                               scratch + shape.weights);
                    ordered = block;
                  }
                  point_rows(a, shape, row, rows, group, scratch + shape.copies, row_codes);
                  const int64_t stride = IntegerShape::rounded(channels, Set::kChannels);
                  if constexpr (Set::kAdds) memset(acc, 0, rows * stride * sizeof(int32_t));
                  Set::dot(a, shape, row_codes, rows, scratch + shape.weights, channels, acc, stride);
                  outputs.store(acc, stride, row, rows, channel, channels);
                });
}

void integer_layer(const IntegerLayer& a, int64_t begin, int64_t end, uint8_t* scratch) {
  if (a.depthwise) return layer_by_columns<Depthwise>(a, begin, end, scratch);
  if constexpr (Columns::kChannels > 0) {
    if (a.by_columns) return layer_by_columns<Columns>(a, begin, end, scratch);
  }
  layer_by_rows(a, begin, end, scratch);
}

}  // namespace
}  // namespace cg::CG_ISA
