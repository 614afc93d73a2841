// What the files of ops on CUDA tensors share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

#include "../arguments.h"
#include "../checks.h"

namespace cg::cuda {

using at::Tensor;
using c10::cuda::CUDAGuard;
using c10::cuda::getCurrentCUDAStream;

inline at::ScalarType compute_type(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }

inline Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

// What the kernels are told of alpha, and the tensor that holds it.
struct PreparedAlphas {
  Tensor alpha;
  Alphas alphas;

  PreparedAlphas(const Tensor& dense, Dtype dtype, const Tensor& given, std::optional<int64_t> channel_dim) {
    const Channels channels = channels_of(dense, channel_dim);
    check_alpha(given, dense, channel_dim);
    alpha = given.to(compute_type(dtype)).contiguous();
    alphas = {alpha.const_data_ptr(), channels.count, channels.inner};
  }
};

}  // namespace cg::cuda
