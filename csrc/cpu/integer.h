// The kernels of layers on codes. They have more instruction sets than the others: products of bytes came later.
#pragma once

#include "../arguments.h"

namespace cg {

constexpr int64_t kWeightBlock = 32;  // bytes

// An output pixel, or a row of a Linear's input, is a row of codes as long as a row of weights. Rows are cut into
// groups of rows_per_task, and the channels of a group of the convolution into channels_per_task.
struct IntegerShape {
  int64_t rows, row_codes, padded_codes, code_stride, group_channels, row_tasks, channel_tasks;

  explicit IntegerShape(const IntegerLayer& a)
      : rows(a.images * a.out_size[0] * a.out_size[1]),
        row_codes(a.channels / a.groups * a.kernel[0] * a.kernel[1]),
        padded_codes(a.row_bytes * 8 / a.weight_bits),
        code_stride(padded_codes + 64),
        group_channels(a.out_channels / a.groups),
        row_tasks(parts(rows, a.rows_per_task)),
        channel_tasks(parts(group_channels, a.channels_per_task)) {}

  int64_t tasks(const IntegerLayer& a) const { return row_tasks * a.groups * channel_tasks; }
  // Bytes that a thread needs: rows of codes, and their accumulators.
  int64_t scratch(const IntegerLayer& a) const {
    return a.rows_per_task * (code_stride + a.channels_per_task * static_cast<int64_t>(sizeof(int32_t)));
  }
  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
};

struct IntegerKernels {
  const char* isa;
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

}  // namespace cg
