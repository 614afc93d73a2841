// The ops on CUDA tensors: checks, allocation, and the launches. Nothing here waits for the device or reads from it, so
// that all of it can be captured in a CUDA graph.
#include <optional>

#include "../register.h"
#include "launch.cuh"
#include "tensors.h"

#include "dispatch.cuh"

namespace cg::cuda {
namespace {

struct Outputs {
  Tensor mask, codes;
};

// Runs the forward from dense x into y (null: codes alone), allocating what is saved.
Outputs run_forward(const Tensor& x, void* y, const Tensor& alpha, int64_t bits, int64_t rounding, int64_t mask,
                    bool codes, std::optional<int64_t> channel_dim) {
  check_bits(bits);
  Forward a{};
  a.dtype = dtype_of(x, "x");
  a.rounding = parse("rounding", rounding, kRoundings);
  a.kind = parse("mask", mask, kMaskKinds);
  a.bits = static_cast<int>(bits);
  a.count = x.numel();
  a.x = x.const_data_ptr();
  a.y = y;
  const PreparedAlphas prepared(x, a.dtype, alpha, channel_dim);
  a.alphas = prepared.alphas;
  Outputs out{empty_bytes(x, packed_bytes(a.count, mask_width(a.kind))),
              empty_bytes(x, codes ? packed_bytes(a.count, packed_width(a.bits)) : 0)};
  if (a.kind != MaskKind::nothing) a.mask = out.mask.mutable_data_ptr<uint8_t>();
  if (codes) a.codes = out.codes.mutable_data_ptr<uint8_t>();
  launch_forward(a, getCurrentCUDAStream().stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qrelu_forward(const Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding,
                                                 int64_t mask, bool codes, std::optional<int64_t> channel_dim) {
  const CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  Tensor y = at::empty_like(dense, dense.options(), x.suggest_memory_format());
  Outputs out = run_forward(dense, y.mutable_data_ptr(), alpha, bits, rounding, mask, codes, channel_dim);
  return {std::move(y), std::move(out.mask), std::move(out.codes)};
}

std::tuple<Tensor, Tensor> qrelu_forward_(Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding, int64_t mask,
                                          bool codes, std::optional<int64_t> channel_dim) {
  const CUDAGuard guard(x.device());
  Tensor dense = x.contiguous(x.suggest_memory_format());
  Outputs out = run_forward(dense, dense.mutable_data_ptr(), alpha, bits, rounding, mask, codes, channel_dim);
  if (!dense.is_same(x)) x.copy_(dense);
  return {std::move(out.mask), std::move(out.codes)};
}

Tensor qrelu_codes(const Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding,
                   std::optional<int64_t> channel_dim) {
  const CUDAGuard guard(x.device());
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  return run_forward(dense, nullptr, alpha, bits, rounding, int64_t(MaskKind::nothing), true, channel_dim).codes;
}

std::tuple<Tensor, Tensor> qrelu_backward(const Tensor& grad_y, const std::optional<Tensor>& alpha,
                                          const std::optional<Tensor>& x, const std::optional<Tensor>& mask,
                                          const std::optional<Tensor>& codes, int64_t bits, int64_t ste,
                                          int64_t rounding, int64_t alpha_grad, double alpha_scale,
                                          std::optional<int64_t> channel_dim, bool need_grad_x, bool need_grad_alpha) {
  check_bits(bits);
  const CUDAGuard guard(grad_y.device());
  Backward a{};
  a.dtype = dtype_of(grad_y, "grad_y");
  a.ste = parse("ste", ste, kStes);
  a.rounding = parse("rounding", rounding, kRoundings);
  a.rule = parse("alpha_grad", alpha_grad, kAlphaGrads);
  a.bits = static_cast<int>(bits);
  a.count = grad_y.numel();
  a.scale = number_of_scale(alpha_scale, grad_y, bits);
  const Saved saved = cg::saved(a.ste, a.rounding, a.rule, need_grad_x, need_grad_alpha);
  a.kind = saved.mask;
  check_saved(saved, grad_y, alpha, x, mask, codes, bits, a.ste, a.rule);
  const at::MemoryFormat format = grad_y.suggest_memory_format();
  const Tensor dense = grad_y.contiguous(format);
  a.grad_y = dense.const_data_ptr();
  const Channels channels = channels_of(dense, channel_dim);
  a.alphas = {nullptr, channels.count, channels.inner};
  Tensor x_dense;
  std::optional<PreparedAlphas> prepared;
  if (saved.x) {
    x_dense = x->contiguous(format);
    a.x = x_dense.const_data_ptr();
    a.alphas = prepared.emplace(dense, a.dtype, *alpha, channel_dim).alphas;
  }
  if (saved.mask != MaskKind::nothing) a.mask = mask->const_data_ptr<uint8_t>();
  if (saved.codes) a.codes = codes->const_data_ptr<uint8_t>();

  Tensor grad_x = need_grad_x ? at::empty_like(dense, dense.options(), format) : at::empty({0}, dense.options());
  if (need_grad_x) a.grad_x = grad_x.mutable_data_ptr();
  const auto sums = dense.options().dtype(compute_type(a.dtype));
  const int64_t wanted = !need_grad_alpha ? 0 : channel_dim ? grad_y.size(*channel_dim) : 1;
  Tensor grad_alpha = at::empty({wanted}, sums), partial;
  if (wanted > 0) {
    a.grad_alpha = grad_alpha.mutable_data_ptr();
    partial = at::empty({partial_count(a)}, sums);
    a.partial = partial.mutable_data_ptr();
  }
  launch_backward(a, getCurrentCUDAStream().stream());
  const bool copies = need_grad_x && !saved.x && !saved.codes && saved.mask == MaskKind::nothing;  // identity
  if (copies) grad_x.copy_(dense);
  return {std::move(grad_x), std::move(grad_alpha)};
}

Tensor dequantize(const Tensor& codes, const Tensor& alpha, int64_t bits, at::IntArrayRef shape, at::ScalarType dtype,
                  std::optional<int64_t> channel_dim, at::MemoryFormat memory_format) {
  check_bits(bits);
  const CUDAGuard guard(codes.device());
  Tensor y = at::empty(shape, codes.options().dtype(dtype), memory_format);
  Dequantize a{};
  a.dtype = dtype_of(y, "dtype");
  a.bits = static_cast<int>(bits);
  a.count = y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), y.device());
  a.codes = codes.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  const PreparedAlphas prepared(y, a.dtype, alpha, channel_dim);
  a.alphas = prepared.alphas;
  launch_dequantize(a, getCurrentCUDAStream().stream());
  return y;
}

Tensor backward_from_slopes(const Tensor& grad_y, const Tensor& codes, const Tensor& slopes, int64_t bits) {
  check_bits(bits);
  const CUDAGuard guard(grad_y.device());
  BackwardFromSlopes a{};
  a.dtype = dtype_of(grad_y, "grad_y");
  a.bits = static_cast<int>(bits);
  a.count = grad_y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), grad_y.device());
  check_slopes(slopes, grad_y, bits);
  const at::MemoryFormat format = grad_y.suggest_memory_format();
  const Tensor dense = grad_y.contiguous(format);
  Tensor grad_x = at::empty_like(dense, dense.options(), format);
  a.grad_y = dense.const_data_ptr();
  a.codes = codes.const_data_ptr<uint8_t>();
  a.slopes = slopes.const_data_ptr();
  a.grad_x = grad_x.mutable_data_ptr();
  launch_backward_from_slopes(a, getCurrentCUDAStream().stream());
  return grad_x;
}

}  // namespace
}  // namespace cg::cuda

namespace cg {

void register_cuda(torch::Library& library) {
  library.impl("qrelu_forward", cuda::qrelu_forward);
  library.impl("qrelu_forward_", cuda::qrelu_forward_);
  library.impl("qrelu_backward", cuda::qrelu_backward);
  library.impl("qrelu_codes", cuda::qrelu_codes);
  library.impl("dequantize", cuda::dequantize);
  library.impl("backward_from_slopes", cuda::backward_from_slopes);
}

}  // namespace cg
