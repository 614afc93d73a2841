// The ops that python/coarsegrad/_ops.py defines: signatures, and functions that register the kernels of a dispatch
// key.
#pragma once

#include <torch/library.h>

#include <optional>
#include <string_view>

namespace cg {

// The ops with a kernel per device. Options are numbers of enumerators.
using ForwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor& x, const at::Tensor& alpha,
                                                                 int64_t bits, int64_t rounding, int64_t mask,
                                                                 bool codes, std::optional<int64_t> channel_dim);
using ForwardInplaceOp = std::tuple<at::Tensor, at::Tensor>(at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                                            int64_t rounding, int64_t mask, bool codes,
                                                            std::optional<int64_t> channel_dim);
using BackwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad_y, const std::optional<at::Tensor>& alpha,
                                                      const std::optional<at::Tensor>& x,
                                                      const std::optional<at::Tensor>& mask,
                                                      const std::optional<at::Tensor>& codes, int64_t bits, int64_t ste,
                                                      int64_t rounding, int64_t alpha_grad, double alpha_scale,
                                                      std::optional<int64_t> channel_dim, bool need_grad_x,
                                                      bool need_grad_alpha);
// The ops that users' graphs contain. Options are names.
using QReluOp = at::Tensor(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                           std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                           std::optional<int64_t> channel_dim);
using QReluInplaceOp = at::Tensor&(at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                                   std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                                   std::optional<int64_t> channel_dim);

void register_cpu(torch::Library& library);
void register_integer_cpu(torch::Library& library);
void register_signed_cpu(torch::Library& library);
void register_weights_cpu(torch::Library& library);
void register_cuda(torch::Library& library);  // in a build with csrc/cuda
void register_signed_cuda(torch::Library& library);
void register_weights_cuda(torch::Library& library);
void register_autograd(torch::Library& library);

// The ops qrelu and qrelu_ called through the dispatcher, as torch.ops does but without parsing arguments by schema.
at::Tensor dispatch_qrelu(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                          std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                          std::optional<int64_t> channel_dim);
at::Tensor dispatch_qrelu_(at::Tensor x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                           std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                           std::optional<int64_t> channel_dim);

// Not an op: the yardstick of the CPU kernels in benchmarks. Copies bytes in the same blocks and threads.
void copy_cpu(const at::Tensor& to, const at::Tensor& from);

}  // namespace cg
