// The CUDA kernels of qsigned and of the Hadamard rotation on the CPU.
#include "cuda_host_cases.h"

#include "cuda/signed_dispatch.cuh"

namespace {

void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const auto dtype = static_cast<Dtype>(h.dtype);
  const int bits = static_cast<int>(h.bits);
  bf16* const group_alphas = static_cast<bf16*>(b[kGroupAlphas].data());
  if (h.op == kSignedForward) {
    const SignedForward a{.dtype = dtype,
                          .bits = bits,
                          .count = h.count,
                          .alphas = alphas_of(h, b),
                          .group = h.group,
                          .group_alphas = group_alphas,
                          .x = b[kX].data(),
                          .y = b[kY].data(),
                          .mask = b[kMask].packed(),
                          .codes = b[kCodes].packed(),
                          .stream = false};
    launch_signed_forward(a, scratch(dtype, scratch_count(a)).data(), cudaStream_t{});
  } else if (h.op == kSignedDequantize) {
    launch_signed_dequantize(SignedDequantize{.dtype = dtype,
                                              .bits = bits,
                                              .count = h.count,
                                              .alphas = alphas_of(h, b),
                                              .group = h.group,
                                              .group_alphas = group_alphas,
                                              .codes = b[kCodes].packed(),
                                              .y = b[kY].data(),
                                              .stream = false},
                             cudaStream_t{});
  } else {
    const Hadamard a{
        .dtype = dtype, .count = h.count, .size = h.group, .scale = h.scale, .x = b[kX].data(), .y = b[kY].data()};
    launch_hadamard(a, scratch(dtype, scratch_count(a)).data(), cudaStream_t{});
  }
}

}  // namespace

int main() { return run_cases(run); }
