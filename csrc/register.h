// Each adds the kernels of one dispatch key to the ops that python/coarsegrad/_ops.py defines.
#pragma once

#include <torch/library.h>

#include <optional>
#include <string_view>

namespace cg {

void register_cpu(torch::Library& library);
void register_cuda(torch::Library& library);  // csrc/cuda, where it is built
void register_autograd(torch::Library& library);

// The ops qrelu and qrelu_ by way of the dispatcher, as torch.ops calls them, without a search of the schema for each
// argument.
at::Tensor dispatch_qrelu(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                          std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                          std::optional<int64_t> channel_dim);
at::Tensor dispatch_qrelu_(at::Tensor x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                           std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                           std::optional<int64_t> channel_dim);

// No op: what benchmarks measure the CPU kernels by. Copies bytes, in blocks and threads as they do.
void copy_cpu(const at::Tensor& to, const at::Tensor& from);

}  // namespace cg
