// The CUDA kernels of qrelu on the CPU.
#include "cuda_host_cases.h"

#include "cuda/dispatch.cuh"

namespace {

void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const Alphas alphas = alphas_of(h, b);
  const auto dtype = static_cast<Dtype>(h.dtype);
  const auto rounding = static_cast<Rounding>(h.rounding);
  const auto kind = static_cast<MaskKind>(h.kind);
  const int bits = static_cast<int>(h.bits);
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
    std::vector<double> partial = scratch(dtype, a.grad_alpha ? cuda::partial_count(a) : 0);
    if (a.grad_alpha) a.partial = partial.data();
    launch_backward(a, cudaStream_t{});
  }
}

}  // namespace

int main() { return run_cases(run); }
