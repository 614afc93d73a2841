// The CUDA kernels of a norm and its staircase on the CPU.
#include "cuda_host_cases.h"

#include "cuda/norm_dispatch.cuh"

namespace {

// `channels` rows of `inner` elements; scale is eps.
void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const auto dtype = static_cast<Dtype>(h.dtype);
  NormStaircase a{.norm = {.dtype = dtype,
                           .rows = h.channels,
                           .length = h.inner,
                           .eps = h.scale,
                           .rounds_twice = (h.flags & 2) != 0,
                           .x = b[kX].data(),
                           .weight = b[kWeight].data(),
                           .bias = b[kBias].data(),
                           .out = b[kOut].data(),
                           .mean = b[kMean].data(),
                           .inverse = b[kInverse].data()},
                  .wide_parameters = (h.flags & 4) != 0,
                  .shifted = (h.flags & 1) != 0,
                  .rotation = {},
                  .staircase = {}};
  if (h.bits > 0) {
    a.staircase = {.dtype = dtype,
                   .bits = static_cast<int>(h.bits),
                   .count = h.count,
                   .alphas = {},
                   .group = h.group,
                   .group_alphas = static_cast<bf16*>(b[kGroupAlphas].data()),
                   .x = nullptr,
                   .y = b[kY].data(),
                   .mask = nullptr,
                   .codes = b[kCodes].packed(),
                   .stream = false};
  }
  if (h.rotation > 0) {
    a.rotation = {.dtype = dtype,
                  .count = h.count,
                  .size = h.rotation,
                  .scale = std::sqrt(1 / static_cast<double>(h.rotation)),
                  .x = nullptr,
                  .y = nullptr};
  }
  launch_norm(a, scratch(dtype, scratch_count(a)).data(), cudaStream_t{});
}

}  // namespace

int main() { return run_cases(run); }
