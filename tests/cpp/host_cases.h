// What the programs that run kernels by themselves share: they read cases from the standard input, run each as the ops
// would, and write what came out to the standard output. tests/cuda_host.py writes the cases.
//
// A case is a Header and kBuffers buffers. A buffer is its mode, size in bytes and distance from a 16-byte boundary,
// and, where it is read, its bytes. What is only written starts as all ones: NaN. Out come the buffers that were
// written.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "arguments.h"

enum Op : int64_t {
  kForward,
  kBackward,
  kDequantize,
  kBackwardFromSlopes,
  kSignedForward,
  kSignedDequantize,
  kHadamard,
  kWeightScale,
  kNorm,
  kCopy,
  kLinear,  // this and the next two on codes
  kConv,
  kDepthwise,
};
enum Mode : int64_t { kNull, kRead, kWrite, kReadWrite };
enum Place {
  kAlpha,
  kX,
  kY,
  kMask,
  kCodes,
  kGradY,
  kGradX,
  kGradAlpha,
  kSlopes,
  kGroupAlphas,
  kWeight,
  kBias,
  kOut,
  kMean,
  kInverse,
  kBuffers
};

struct Header {
  int64_t op, seed, dtype, rounding, bits, count, channels, inner, kind, ste, rule, in_place, group, rotation, flags;
  double scale;
};

struct Buffer {
  int64_t mode = kNull, bytes = 0, offset = 0;
  std::unique_ptr<char[]> memory;

  void* data() const { return mode == kNull ? nullptr : memory.get() + offset; }
  uint8_t* packed() const { return static_cast<uint8_t*>(data()); }
};

inline bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }
inline void need(void* to, size_t bytes) {
  if (!read(to, bytes)) throw std::runtime_error("the input ends within a case");
}

// Room for `count` numbers of the compute type, all NaN.
inline std::vector<double> scratch(cg::Dtype dtype, int64_t count) {
  const size_t size = dtype == cg::Dtype::float64 ? sizeof(double) : sizeof(float);
  return std::vector<double>(count * size / sizeof(double) + 1, NAN);
}

inline cg::Alphas alphas_of(const Header& h, const Buffer (&b)[kBuffers]) {
  return {b[kAlpha].data(), h.channels, h.inner};
}

// The arguments of a case's kernel, for GPUs and CPUs.
inline cg::Forward forward_of(const Header& h, const Buffer (&b)[kBuffers], const cg::Alphas& alphas) {
  return {.dtype = static_cast<cg::Dtype>(h.dtype),
          .rounding = static_cast<cg::Rounding>(h.rounding),
          .bits = static_cast<int>(h.bits),
          .count = h.count,
          .alphas = alphas,
          .x = b[kX].data(),
          .y = h.in_place ? b[kX].data() : b[kY].data(),
          .mask = b[kMask].packed(),
          .kind = static_cast<cg::MaskKind>(h.kind),
          .codes = b[kCodes].packed(),
          .stream = false};
}
inline cg::Dequantize dequantize_of(const Header& h, const Buffer (&b)[kBuffers], const cg::Alphas& alphas) {
  return {.dtype = static_cast<cg::Dtype>(h.dtype),
          .bits = static_cast<int>(h.bits),
          .count = h.count,
          .alphas = alphas,
          .codes = b[kCodes].packed(),
          .y = b[kY].data(),
          .stream = false};
}
inline cg::BackwardFromSlopes backward_from_slopes_of(const Header& h, const Buffer (&b)[kBuffers]) {
  return {.dtype = static_cast<cg::Dtype>(h.dtype),
          .bits = static_cast<int>(h.bits),
          .count = h.count,
          .grad_y = b[kGradY].data(),
          .codes = b[kCodes].packed(),
          .slopes = b[kSlopes].data(),
          .grad_x = b[kGradX].data(),
          .stream = false};
}
inline cg::Backward backward_of(const Header& h, const Buffer (&b)[kBuffers], const cg::Alphas& alphas) {
  return {.dtype = static_cast<cg::Dtype>(h.dtype),
          .ste = static_cast<cg::Ste>(h.ste),
          .rounding = static_cast<cg::Rounding>(h.rounding),
          .rule = static_cast<cg::AlphaGrad>(h.rule),
          .bits = static_cast<int>(h.bits),
          .count = h.count,
          .alphas = alphas,
          .grad_y = b[kGradY].data(),
          .x = b[kX].data(),
          .mask = b[kMask].packed(),
          .kind = static_cast<cg::MaskKind>(h.kind),
          .codes = b[kCodes].packed(),
          .grad_x = b[kGradX].data(),
          .partial = nullptr,
          .chunk_blocks = 0,
          .stream = false,
          .scale = h.scale,
          .grad_alpha = b[kGradAlpha].data()};
}

// Calls run(header, buffers) for each case; returns the exit status.
template <class Run>
int for_each_case(const Run& run) {
  try {
    for (Header header; read(&header, sizeof(header));) {
      Buffer buffers[kBuffers];
      for (Buffer& buffer : buffers) {
        need(&buffer.mode, sizeof(int64_t));
        need(&buffer.bytes, sizeof(int64_t));
        need(&buffer.offset, sizeof(int64_t));
        buffer.memory.reset(new char[buffer.offset + buffer.bytes]);
        std::memset(buffer.memory.get(), 0xff, buffer.offset + buffer.bytes);
        if (buffer.mode == kRead || buffer.mode == kReadWrite) need(buffer.data(), buffer.bytes);
      }
      run(header, buffers);
      for (const Buffer& buffer : buffers) {
        if (buffer.mode == kWrite || buffer.mode == kReadWrite) std::fwrite(buffer.data(), 1, buffer.bytes, stdout);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
