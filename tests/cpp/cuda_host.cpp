// The CUDA kernels on the CPU: reads cases from the standard input, runs each as the CUDA ops would, and writes what
// came out to the standard output. tests/cuda_host.py writes the cases.
//
// A case is a Header and kBuffers buffers. A buffer is its mode, size in bytes and distance from a 16-byte boundary,
// and, where it is read, its bytes. What is only written starts as all ones: NaN. Out come the buffers that were
// written.
#include "cuda_host.h"

#include <cstdio>

#include "cuda/dispatch.cuh"

namespace {

enum Op : int64_t { kForward, kBackward, kDequantize, kBackwardFromSlopes };
enum Mode : int64_t { kNull, kRead, kWrite, kReadWrite };
enum Place { kAlpha, kX, kY, kMask, kCodes, kGradY, kGradX, kGradAlpha, kSlopes, kBuffers };

struct Header {
  int64_t op, seed, dtype, rounding, bits, count, channels, inner, kind, ste, rule, in_place;
  double scale;
};

struct Buffer {
  int64_t mode = kNull, bytes = 0, offset = 0;
  std::unique_ptr<char[]> memory;

  void* data() const { return mode == kNull ? nullptr : memory.get() + offset; }
  uint8_t* packed() const { return static_cast<uint8_t*>(data()); }
};

bool read(void* to, size_t bytes) { return bytes == 0 || std::fread(to, bytes, 1, stdin) == 1; }
void need(void* to, size_t bytes) {
  if (!read(to, bytes)) throw std::runtime_error("the input ends within a case");
}

void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const Alphas alphas{b[kAlpha].data(), h.channels, h.inner};
  const auto dtype = static_cast<Dtype>(h.dtype);
  const auto rounding = static_cast<Rounding>(h.rounding);
  const auto kind = static_cast<MaskKind>(h.kind);
  const int bits = static_cast<int>(h.bits);
  cuda_host::random_order.seed(static_cast<unsigned>(h.seed));
  if (h.op == kForward) {
    void* y = h.in_place ? b[kX].data() : b[kY].data();
    launch_forward(Forward{.dtype = dtype,
                           .rounding = rounding,
                           .bits = bits,
                           .count = h.count,
                           .alphas = alphas,
                           .x = b[kX].data(),
                           .y = y,
                           .mask = b[kMask].packed(),
                           .kind = kind,
                           .codes = b[kCodes].packed(),
                           .stream = false},
                   cudaStream_t{});
  } else if (h.op == kDequantize) {
    launch_dequantize(Dequantize{.dtype = dtype,
                                 .bits = bits,
                                 .count = h.count,
                                 .alphas = alphas,
                                 .codes = b[kCodes].packed(),
                                 .y = b[kY].data(),
                                 .stream = false},
                      cudaStream_t{});
  } else if (h.op == kBackwardFromSlopes) {
    launch_backward_from_slopes(BackwardFromSlopes{.dtype = dtype,
                                                   .bits = bits,
                                                   .count = h.count,
                                                   .grad_y = b[kGradY].data(),
                                                   .codes = b[kCodes].packed(),
                                                   .slopes = b[kSlopes].data(),
                                                   .grad_x = b[kGradX].data(),
                                                   .stream = false},
                                cudaStream_t{});
  } else {
    Backward a{.dtype = dtype,
               .ste = static_cast<Ste>(h.ste),
               .rounding = rounding,
               .rule = static_cast<AlphaGrad>(h.rule),
               .bits = bits,
               .count = h.count,
               .alphas = alphas,
               .grad_y = b[kGradY].data(),
               .x = b[kX].data(),
               .mask = b[kMask].packed(),
               .kind = kind,
               .codes = b[kCodes].packed(),
               .grad_x = b[kGradX].data(),
               .partial = nullptr,
               .chunk_blocks = 0,
               .stream = false,
               .scale = h.scale,
               .grad_alpha = b[kGradAlpha].data()};
    std::vector<double> partial;
    if (a.grad_alpha) {
      const size_t size = dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
      partial.assign(cuda::partial_count(a) * size / sizeof(double) + 1, NAN);
      a.partial = partial.data();
    }
    launch_backward(a, cudaStream_t{});
  }
}

}  // namespace

int main() {
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
