// The kernels of layers on codes. They have more instruction sets than the others: products of bytes came later.
#pragma once

#include <algorithm>

#include "../arguments.h"
#include "../math/macros.h"

namespace cg {

constexpr int64_t kWeightBlock = 32;  // bytes

// An output pixel, or a row of a Linear's input, is a row of codes as long as a row of weights. Rows are cut into
// groups of rows_per_task, and the channels of a group of the convolution into channels_per_task.
struct IntegerShape {
  static constexpr int64_t kStored = 16;  // channels whose outputs are computed at a time
  static constexpr int64_t kMinOrderedRows = 8;

  int64_t rows, row_codes, padded_codes, code_stride, group_channels, row_tasks, channel_tasks;

  explicit IntegerShape(const IntegerLayer& a)
      : rows(a.images * a.out_size[0] * a.out_size[1]),
        row_codes((a.depthwise ? 1 : a.channels / a.groups) * a.kernel[0] * a.kernel[1]),
        padded_codes(a.row_bytes * 8 / a.weight_bits),
        code_stride(padded_codes + 64),
        group_channels(a.out_channels / a.groups),
        row_tasks(parts(rows, a.rows_per_task)),
        channel_tasks(parts(group_channels, a.channels_per_task)) {}

  int64_t tasks(const IntegerLayer& a) const { return row_tasks * a.groups * channel_tasks; }
  // Bytes that a thread needs: for the numbers that its outputs take first.
  int64_t scratch(const IntegerLayer& a) const;
  // Thresholds are put in the order in which channels are stored if there are rows enough for it.
  bool orders_thresholds(const IntegerLayer& a) const { return a.thresholds && rows >= kMinOrderedRows; }
  int64_t output_bytes(const IntegerLayer& a) const {
    const int64_t numbers = orders_thresholds(a) ? a.levels : a.thresholds ? 0 : 2;
    return numbers * rounded(a.channels_per_task, kStored) * static_cast<int64_t>(sizeof(int32_t));
  }

  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
  static int64_t rounded(int64_t count, int64_t to) { return parts(count, to) * to; }
};

// What is multiplied across channels. The window of an output pixel is in pieces of codes, each of them as they lie in
// the image or a copy of some of its lines, and multiplied four at a time.
struct ColumnShape : IntegerShape {
  bool in_place, in_lines;  // or windows are copied one by one
  int64_t pieces, piece_codes, quads, reach, piece_stride, channels, unpacked_stride;
  // Where in a thread's scratch.
  int64_t weights, unpacked, acc, copies, bytes;
  int64_t offset_bytes;  // of where pixels of a window are, before depthwise weights

  // That a set multiplies at a time; pixels of a depthwise window.
  static constexpr int64_t kAlignment = 64, kMaxChannels = 32, kMaxQuads = 2, kMaxPixels = 2;

  CG_HD explicit ColumnShape(const IntegerLayer& a) : IntegerShape(a) {
    const int64_t pixel = a.channels / a.groups, line = a.kernel[1] * pixel;
    in_lines = a.depthwise || a.kernel[1] == 1 || a.dilation[1] == 1;
    pieces = in_lines ? a.kernel[0] : 1;
    piece_codes = in_lines ? line : row_codes;
    quads = parts(piece_codes, 4);
    in_place = in_lines && a.padding[0] == 0 && a.padding[1] == 0 &&
               (a.depthwise ? pixel % kMaxChannels == 0 : piece_codes % 4 == 0 && (a.groups == 1 || a.kernel[1] == 1));
    // Of each line of the output that a task has a part of, the lines of the image that are needed.
    reach = a.dilation[1] * (a.kernel[1] - 1) + 1;
    const int64_t line_pixels = (std::min(a.rows_per_task, a.out_size[1]) - 1) * a.stride[1] + reach;
    const int64_t copied_lines = a.rows_per_task / std::max<int64_t>(a.out_size[1], 1) + 2;
    piece_stride = in_place   ? a.dilation[0] * a.size[1] * a.channels
                   : in_lines ? rounded(line_pixels * pixel, kAlignment) + kAlignment
                              : code_stride;
    channels = rounded(a.channels_per_task, kMaxChannels);
    unpacked_stride = padded_codes + kAlignment;
    weights = rounded(a.rows_per_task * static_cast<int64_t>(sizeof(uint8_t*)), kAlignment);
    const int64_t window = a.kernel[0] * a.kernel[1];
    offset_bytes = a.depthwise ? rounded(kMaxPixels * window * static_cast<int64_t>(sizeof(int64_t)), kAlignment) : 0;
    unpacked = weights + offset_bytes +
               channels * (a.depthwise ? kMaxPixels * window : pieces * rounded(quads, kMaxQuads) * 4);
    acc = unpacked + kMaxChannels * unpacked_stride;
    copies = acc + a.rows_per_task * channels * static_cast<int64_t>(sizeof(int32_t));
    bytes = copies + (in_place ? 0 : in_lines ? copied_lines * pieces * piece_stride : a.rows_per_task * piece_stride);
  }
};

inline int64_t IntegerShape::scratch(const IntegerLayer& a) const {
  if (a.by_columns || a.depthwise) return output_bytes(a) + ColumnShape(a).bytes;
  const int64_t acc_stride = rounded(a.channels_per_task, kStored) * static_cast<int64_t>(sizeof(int32_t));
  return output_bytes(a) + a.rows_per_task * (code_stride + acc_stride);
}

struct IntegerKernels {
  const char* isa;
  bool by_columns;  // can compute so
  // Runs tasks [begin, end); scratch is aligned to 64 bytes.
  void (*layer)(const IntegerLayer&, int64_t begin, int64_t end, uint8_t* scratch);
};

extern const IntegerKernels kIntegerKernelsDefault;
#if defined(CG_HAVE_AVX2)
extern const IntegerKernels kIntegerKernelsAvx2;
#endif
#if defined(CG_HAVE_AVXVNNI)
extern const IntegerKernels kIntegerKernelsAvxVnni;
#endif
#if defined(CG_HAVE_AVX512)
extern const IntegerKernels kIntegerKernelsAvx512;
#endif
#if defined(CG_HAVE_AVX512VNNI)
extern const IntegerKernels kIntegerKernelsAvx512Vnni;
#endif
#if defined(CG_HAVE_AMX)
extern const IntegerKernels kIntegerKernelsAmx;
#endif
#if defined(CG_HAVE_NEON)
extern const IntegerKernels kIntegerKernelsNeon;
#endif
#if defined(CG_HAVE_NEONDOT)
extern const IntegerKernels kIntegerKernelsNeonDot;
#endif
#if defined(CG_HAVE_NEONI8MM)
extern const IntegerKernels kIntegerKernelsNeonI8mm;
#endif

}  // namespace cg
