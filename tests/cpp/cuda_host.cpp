// The CUDA kernels of qrelu on the CPU.
#include "cuda_host_cases.h"

#include "cuda/dispatch.cuh"

namespace {

void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const Alphas alphas = alphas_of(h, b);
  if (h.op == kForward) {
    launch_forward(forward_of(h, b, alphas), cudaStream_t{});
  } else if (h.op == kDequantize) {
    launch_dequantize(dequantize_of(h, b, alphas), cudaStream_t{});
  } else if (h.op == kBackwardFromSlopes) {
    launch_backward_from_slopes(backward_from_slopes_of(h, b), cudaStream_t{});
  } else {
    Backward a = backward_of(h, b, alphas);
    std::vector<double> partial = scratch(a.dtype, a.grad_alpha ? cuda::partial_count(a) : 0);
    if (a.grad_alpha) a.partial = partial.data();
    launch_backward(a, cudaStream_t{});
  }
}

}  // namespace

int main() { return run_cases(run); }
