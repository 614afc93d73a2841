// The layers on codes: checks, allocation, how the work is cut, and the kernels of the instruction set in use.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../register.h"
#include "integer.h"
#include "isa.h"
#include "transpose_bytes.h"

namespace cg {
namespace {

using at::Tensor;

// Rows that share what is loaded of the weights, and bytes of weights that stay in the L2 cache for all rows.
constexpr int64_t kRowsPerTask = 32, kWeightBytesPerTask = 256 << 10;
// The same across channels, for which fewer rows do not pay.
constexpr int64_t kColumnRowsPerTask = 64, kMinColumnRows = 48;
// Sums of a depthwise layer that stay in the L2 cache.
constexpr int64_t kDepthwiseSumsPerTask = 16 << 10;
// Products of a byte each that a thread takes at least.
constexpr int64_t kGrain = int64_t{1} << 20;
// The same of codes that are copied or converted.
constexpr int64_t kCopyGrain = int64_t{1} << 15;

void check_dtype(const char* name, const Tensor& t, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be torch.", c10::getDtypeNames(dtype).first, ", got torch.",
                   c10::getDtypeNames(t.scalar_type()).first);
}
void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
}

// codes in a memory format. Between channels first and last torch's own copy takes as long as a layer.
Tensor in_format(const Tensor& codes, at::MemoryFormat format) {
  const bool to_last = format == at::MemoryFormat::ChannelsLast;
  const at::MemoryFormat other = to_last ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
  if (codes.dim() != 4 || codes.is_contiguous(format) || !codes.is_contiguous(other)) return codes.contiguous(format);
  const int64_t pixels = codes.size(2) * codes.size(3), rows = to_last ? codes.size(1) : pixels;
  const int64_t columns = to_last ? pixels : codes.size(1), blocks = IntegerShape::parts(rows, kByteBlock);
  Tensor out = at::detail::empty_cpu(codes.sizes(), at::kByte, /*pin_memory=*/false, format);
  const uint8_t* from = codes.const_data_ptr<uint8_t>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, codes.size(0) * blocks, 1 + kCopyGrain / (kByteBlock * (columns + 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t image = i / blocks * rows * columns;
                       transpose_rows(from + image, rows, columns, i % blocks * kByteBlock, to + image);
                     }
                   });
  return out;
}

// What all layers are given. Fields of IntegerLayer that point into tensors point into those here, made contiguous.
struct Layer {
  Tensor codes, weight, scale, offset, thresholds, out;
  IntegerLayer args{};

  // codes, the images and window of args are set before. levels: empty for a float output.
  void set(const Tensor& weight, int64_t bits, int64_t weight_bits, const Tensor& scale, const Tensor& offset,
           const std::optional<Tensor>& thresholds, std::optional<int64_t> levels) {
    check_bits(bits);
    TORCH_CHECK_VALUE(weight_bits == 8 || weight_bits == 4 || weight_bits == 2 || weight_bits == 1,
                      "weight_bits must be one of 8, 4, 2, 1, got ", weight_bits);
    check_dtype("codes", codes, at::kByte);
    check_dtype("weight", weight, at::kByte);
    const int64_t count = args.channels / args.groups * args.kernel[0] * args.kernel[1];
    const int64_t row_bytes = (count * weight_bits + 8 * kWeightBlock - 1) / (8 * kWeightBlock) * kWeightBlock;
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == row_bytes, "weight must have shape [C, ", row_bytes,
                      "] for ", count, " weights of ", weight_bits, " bits, got ", weight.sizes());
    const int64_t channels = weight.size(0);
    for (const auto& [name, t] : {std::pair{"scale", &scale}, std::pair{"offset", &offset}}) {
      check_dtype(name, *t, at::kFloat);
      check_shape(name, *t, {channels});
    }
    if (levels) {
      TORCH_CHECK_VALUE(*levels >= 1 && *levels <= 255, "levels must be in 1..255, got ", *levels);
      if (thresholds) {
        check_dtype("thresholds", *thresholds, at::kInt);
        check_shape("thresholds", *thresholds, {channels, *levels});
        this->thresholds = thresholds->contiguous();
        args.thresholds = this->thresholds.const_data_ptr<int32_t>();
      }
      args.levels = static_cast<int>(*levels);
    }
    this->weight = weight.contiguous(), this->scale = scale.contiguous(), this->offset = offset.contiguous();
    args.bits = static_cast<int>(bits), args.weight_bits = static_cast<int>(weight_bits);
    args.weight = this->weight.const_data_ptr<uint8_t>();
    args.row_bytes = row_bytes, args.out_channels = channels;
    args.scale = this->scale.const_data_ptr<float>(), args.offset = this->offset.const_data_ptr<float>();
  }

  // The output, of this shape and memory format.
  Tensor run(at::IntArrayRef shape, at::MemoryFormat format) {
    const bool to_codes = args.levels > 0;
    out = at::detail::empty_cpu(shape, to_codes ? at::kByte : at::kFloat, /*pin_memory=*/false, format);
    if (out.numel() == 0) return out;
    args.codes = codes.const_data_ptr<uint8_t>();
    if (to_codes) args.out_codes = out.mutable_data_ptr<uint8_t>();
    else args.out = out.mutable_data_ptr<float>();
    const IntegerKernels& kernels = active_kernels<IntegerKernels>();
    cut(kernels);
    const IntegerShape shape_of(args);
    const int64_t task = 1 + args.rows_per_task * args.channels_per_task * shape_of.padded_codes;
    at::parallel_for(0, shape_of.tasks(args), std::max<int64_t>(1, kGrain / task), [&](int64_t begin, int64_t end) {
      const Tensor scratch = at::detail::empty_cpu({shape_of.scratch(args)}, at::kByte);
      kernels.layer(args, begin, end, scratch.mutable_data_ptr<uint8_t>());
    });
    return out;
  }

  // Into tasks.
  void cut(const IntegerKernels& kernels) {
    const int64_t rows = args.images * args.out_size[0] * args.out_size[1], line = args.out_size[1];
    args.depthwise = args.groups > 1 && args.groups == args.channels && args.groups == args.out_channels;
    if (args.depthwise) {
      args.groups = 1, args.channels_per_task = args.channels;
      args.rows_per_task = std::clamp<int64_t>(kDepthwiseSumsPerTask / args.channels, 1, std::min(rows, line));
      return;
    }
    const int64_t channels = args.out_channels / args.groups;
    args.by_columns = kernels.by_columns && rows >= kMinColumnRows;
    args.rows_per_task = std::min(rows, kRowsPerTask);
    int64_t row_bytes = args.row_bytes, unit = 16;  // what channels are a multiple of
    if (args.by_columns) {
      // Whole lines of the output, or an even part of one.
      args.rows_per_task = line <= kColumnRowsPerTask
                               ? std::min(rows, kColumnRowsPerTask / line * line)
                               : IntegerShape::parts(line, IntegerShape::parts(line, kColumnRowsPerTask));
      row_bytes = args.channels / args.groups * args.kernel[0] * args.kernel[1], unit = ColumnShape::kMaxChannels;
    }
    // Channels are divided where there are too few rows for all threads.
    const int64_t parts =
        IntegerShape::parts(4 * at::get_num_threads(), IntegerShape::parts(rows, args.rows_per_task) * args.groups);
    const int64_t even = IntegerShape::rounded(IntegerShape::parts(channels, parts), unit);
    args.channels_per_task = std::min(channels, even);
    if (args.by_columns || rows > args.rows_per_task) {  // weights are read again
      const int64_t cached = kWeightBytesPerTask / std::max<int64_t>(row_bytes, 1) / unit * unit;
      args.channels_per_task = std::min(args.channels_per_task, std::max(unit, cached));
    }
  }
};

Tensor linear(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits, const Tensor& scale,
              const Tensor& offset, const std::optional<Tensor>& thresholds, std::optional<int64_t> levels) {
  TORCH_CHECK_VALUE(codes.dim() >= 1, "codes must have at least one dimension, got none");
  Layer layer;
  layer.codes = codes.contiguous();
  IntegerLayer& a = layer.args;
  a.channels = codes.size(-1), a.groups = 1;
  a.images = 1;
  for (int64_t i = 0; i + 1 < codes.dim(); ++i) a.images *= codes.size(i);
  for (int i = 0; i < 2; ++i) a.size[i] = a.kernel[i] = a.stride[i] = a.dilation[i] = a.out_size[i] = 1;
  layer.set(weight, bits, weight_bits, scale, offset, thresholds, levels);
  std::vector<int64_t> shape = codes.sizes().vec();
  shape.back() = weight.size(0);
  return layer.run(shape, at::MemoryFormat::Contiguous);
}

struct Window {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  int64_t groups;
};

Tensor conv2d(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits, const Tensor& scale,
              const Tensor& offset, const std::optional<Tensor>& thresholds, std::optional<int64_t> levels,
              const Window& window) {
  TORCH_CHECK_VALUE(codes.dim() == 4, "codes must be [N, C, H, W], got shape ", codes.sizes());
  const auto pair = [](const char* name, at::IntArrayRef given, int64_t least, int64_t (&to)[2]) {
    TORCH_CHECK_VALUE(given.size() == 2 && given[0] >= least && given[1] >= least, name, " must be two ints >= ", least,
                      ", got ", given);
    to[0] = given[0], to[1] = given[1];
  };
  Layer layer;
  IntegerLayer& a = layer.args;
  pair("kernel_size", window.kernel_size, 1, a.kernel);
  pair("stride", window.stride, 1, a.stride);
  pair("padding", window.padding, 0, a.padding);
  pair("dilation", window.dilation, 1, a.dilation);
  TORCH_CHECK_VALUE(window.groups >= 1 && codes.size(1) % window.groups == 0 && weight.dim() == 2 &&
                        weight.size(0) % window.groups == 0,
                    "groups must divide the channels of codes, ", codes.size(1), ", and of weight, ",
                    weight.dim() == 2 ? weight.size(0) : 0, ", got ", window.groups);
  layer.codes = in_format(codes, at::MemoryFormat::ChannelsLast);
  a.images = codes.size(0), a.channels = codes.size(1), a.groups = window.groups;
  for (int i = 0; i < 2; ++i) {
    a.size[i] = codes.size(2 + i);
    const int64_t reach = a.dilation[i] * (a.kernel[i] - 1) + 1, room = a.size[i] + 2 * a.padding[i] - reach;
    a.out_size[i] = room < 0 ? 0 : room / a.stride[i] + 1;
  }
  layer.set(weight, bits, weight_bits, scale, offset, thresholds, levels);
  TORCH_CHECK_VALUE(a.out_size[0] > 0 && a.out_size[1] > 0, "kernel_size must be at most the padded input, got ",
                    window.kernel_size, " for ", codes.sizes());
  return layer.run({a.images, weight.size(0), a.out_size[0], a.out_size[1]}, at::MemoryFormat::ChannelsLast);
}

Tensor integer_dequantize(const Tensor& codes, double step, bool contiguous) {
  check_dtype("codes", codes, at::kByte);
  const at::MemoryFormat format = contiguous ? at::MemoryFormat::Contiguous : codes.suggest_memory_format();
  const Tensor dense = in_format(codes, format);
  Tensor out = at::detail::empty_cpu(dense.sizes(), at::kFloat, /*pin_memory=*/false, format);
  const uint8_t* from = dense.const_data_ptr<uint8_t>();
  float* to = out.mutable_data_ptr<float>();
  const float factor = static_cast<float>(step);
  at::parallel_for(0, dense.numel(), kCopyGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = static_cast<float>(from[i]) * factor;
  });
  return out;
}

Tensor integer_linear(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits, const Tensor& scale,
                      const Tensor& offset, const std::optional<Tensor>& thresholds, int64_t levels) {
  return linear(codes, weight, bits, weight_bits, scale, offset, thresholds, levels);
}
Tensor integer_linear_float(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits,
                            const Tensor& scale, const Tensor& offset) {
  return linear(codes, weight, bits, weight_bits, scale, offset, std::nullopt, std::nullopt);
}
Tensor integer_conv2d(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits, const Tensor& scale,
                      const Tensor& offset, const std::optional<Tensor>& thresholds, int64_t levels,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups) {
  return conv2d(codes, weight, bits, weight_bits, scale, offset, thresholds, levels,
                {kernel_size, stride, padding, dilation, groups});
}
Tensor integer_conv2d_float(const Tensor& codes, const Tensor& weight, int64_t bits, int64_t weight_bits,
                            const Tensor& scale, const Tensor& offset, at::IntArrayRef kernel_size,
                            at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return conv2d(codes, weight, bits, weight_bits, scale, offset, std::nullopt, std::nullopt,
                {kernel_size, stride, padding, dilation, groups});
}

}  // namespace

void register_integer_cpu(torch::Library& library) {
  library.impl("integer_dequantize", integer_dequantize);
  library.impl("integer_linear", integer_linear);
  library.impl("integer_linear_float", integer_linear_float);
  library.impl("integer_conv2d", integer_conv2d);
  library.impl("integer_conv2d_float", integer_conv2d_float);
}

}  // namespace cg
