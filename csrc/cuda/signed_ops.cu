// The ops of the signed staircase, of norms before it and of the Hadamard rotation on CUDA tensors, as in ops.cu.
#include <c10/util/accumulate.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../register.h"
#include "launch.cuh"
#include "tensors.h"

#include "norm_dispatch.cuh"

namespace cg::cuda {
namespace {

Tensor empty_scratch(const Tensor& like, Dtype dtype, int64_t count) {
  return at::empty({count}, like.options().dtype(compute_type(dtype)));
}

// The mask where nothing is outside.
Tensor all_inside(const Tensor& x) {
  const int64_t count = x.numel();
  Tensor mask = empty_bytes(x, packed_bytes(count, 1));
  mask.fill_(255);
  if (count % 8 != 0) mask.narrow(0, count / 8, 1).fill_((1 << count % 8) - 1);
  return mask;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qsigned_forward(const Tensor& x, const std::optional<Tensor>& alpha,
                                                           int64_t bits, std::optional<int64_t> group, bool mask,
                                                           bool codes, std::optional<int64_t> channel_dim) {
  const CUDAGuard guard(x.device());
  SignedForward a{};
  a.dtype = dtype_of(x, "x");
  a.group = check_signed(x, alpha.has_value(), bits, group, channel_dim);
  a.bits = static_cast<int>(bits);
  const auto format = alpha ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
  const Tensor dense = x.contiguous(format);
  a.count = dense.numel();
  a.x = dense.const_data_ptr();
  Tensor y = at::empty_like(dense, dense.options(), format);
  a.y = y.mutable_data_ptr();
  Tensor packed_codes = empty_bytes(x, codes ? packed_bytes(a.count, packed_width(a.bits)) : 0);
  if (codes) a.codes = packed_codes.mutable_data_ptr<uint8_t>();
  Tensor packed_mask = empty_bytes(x, mask ? packed_bytes(a.count, 1) : 0);
  std::vector<int64_t> groups{0};
  std::optional<PreparedAlphas> prepared;
  if (alpha) {
    a.alphas = prepared.emplace(dense, a.dtype, *alpha, channel_dim).alphas;
    if (mask) a.mask = packed_mask.mutable_data_ptr<uint8_t>();
  } else {
    groups = x.sizes().vec();
    groups.back() /= a.group;
    if (mask) packed_mask = all_inside(x);
  }
  Tensor found = at::empty(groups, x.options().dtype(at::kBFloat16));
  a.group_alphas = static_cast<bf16*>(found.mutable_data_ptr());
  const Tensor scratch = empty_scratch(x, a.dtype, scratch_count(a));
  launch_signed_forward(a, scratch.mutable_data_ptr(), getCurrentCUDAStream().stream());
  return {std::move(y), std::move(found), std::move(packed_mask), std::move(packed_codes)};
}

Tensor qsigned_dequantize(const Tensor& codes, const Tensor& alpha, int64_t bits, std::optional<int64_t> group,
                          at::IntArrayRef shape, at::ScalarType dtype, std::optional<int64_t> channel_dim,
                          at::MemoryFormat memory_format) {
  check_signed_bits(bits);
  const CUDAGuard guard(codes.device());
  Tensor y = at::empty(shape, codes.options().dtype(dtype), memory_format);
  SignedDequantize a{};
  a.dtype = dtype_of(y, "dtype");
  a.bits = static_cast<int>(bits);
  a.count = y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), y.device());
  a.codes = codes.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  std::optional<PreparedAlphas> prepared;
  Tensor dynamic;
  if (group) {
    check_group_alphas(alpha, y, *group);
    TORCH_CHECK_TYPE(alpha.scalar_type() == at::kBFloat16, "alpha must be bfloat16 for groups, got ",
                     alpha.scalar_type());
    dynamic = alpha.contiguous();
    a.group = *group;
    a.group_alphas = static_cast<const bf16*>(dynamic.const_data_ptr());
  } else {
    a.alphas = prepared.emplace(y, a.dtype, alpha, channel_dim).alphas;
  }
  launch_signed_dequantize(a, getCurrentCUDAStream().stream());
  return y;
}

Hadamard hadamard_of(Dtype dtype, int64_t count, int64_t size) {
  Hadamard a{};
  a.dtype = dtype;
  a.count = count;
  a.size = size;
  a.scale = std::sqrt(1 / static_cast<double>(size));
  return a;
}

Tensor hadamard(const Tensor& x, int64_t size) {
  const CUDAGuard guard(x.device());
  const Dtype dtype = dtype_of(x, "x");
  check_hadamard(x, size);
  Hadamard a = hadamard_of(dtype, x.numel(), size);
  const Tensor dense = x.contiguous();
  Tensor y = at::empty_like(dense, dense.options(), at::MemoryFormat::Contiguous);
  a.x = dense.const_data_ptr();
  a.y = y.mutable_data_ptr();
  const Tensor scratch = empty_scratch(x, a.dtype, scratch_count(a));
  launch_hadamard(a, scratch.mutable_data_ptr(), getCurrentCUDAStream().stream());
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_qsigned(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool centred,
    bool shifted, bool rounds_twice, std::optional<int64_t> bits, std::optional<int64_t> group,
    std::optional<int64_t> rotation, bool output, bool codes) {
  const CUDAGuard guard(x.device());
  NormStaircase a{};
  Norm& n = a.norm;
  n.dtype = dtype_of(x, "x");
  a.staircase.group = check_norm(x, weight, bias, bits, group, rotation, output);
  const Tensor dense = x.contiguous();
  n.length = x.size(-1);
  n.rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  n.eps = eps;
  n.rounds_twice = rounds_twice;
  n.x = dense.const_data_ptr();
  const auto options = x.options(), wide = options.dtype(compute_type(n.dtype));
  a.wide_parameters =
      (weight && weight->scalar_type() != x.scalar_type()) || (bias && bias->scalar_type() != x.scalar_type());
  a.shifted = shifted;
  const auto prepared = [&](const std::optional<Tensor>& given, const void*& pointer) {
    if (!given) return Tensor();
    const Tensor parameter = given->to(a.wide_parameters ? compute_type(n.dtype) : x.scalar_type()).contiguous();
    pointer = parameter.const_data_ptr();
    return parameter;
  };
  const Tensor factors = prepared(weight, n.weight), terms = prepared(bias, n.bias);
  std::vector<int64_t> shape = x.sizes().vec(), none{0};
  Tensor normed = at::empty(output ? shape : none, options), y = at::empty(bits ? shape : none, options);
  if (output) n.out = normed.mutable_data_ptr();
  shape.back() = 1;
  Tensor mean = at::empty(centred ? shape : none, wide), inverse = at::empty(shape, wide);
  if (centred) n.mean = mean.mutable_data_ptr();
  n.inverse = inverse.mutable_data_ptr();
  if (bits) {
    a.staircase.dtype = n.dtype;
    a.staircase.bits = static_cast<int>(*bits);
    a.staircase.count = x.numel();
    a.staircase.y = y.mutable_data_ptr();
    if (rotation) a.rotation = hadamard_of(n.dtype, x.numel(), *rotation);
    shape.back() = n.length / a.staircase.group;
  }
  Tensor packed_codes = empty_bytes(x, bits && codes ? packed_bytes(x.numel(), packed_width(a.staircase.bits)) : 0);
  Tensor found = at::empty(bits ? shape : none, options.dtype(at::kBFloat16));
  if (bits && codes) a.staircase.codes = packed_codes.mutable_data_ptr<uint8_t>();
  a.staircase.group_alphas = static_cast<bf16*>(found.mutable_data_ptr());
  const Tensor scratch = empty_scratch(x, n.dtype, scratch_count(a));
  launch_norm(a, scratch.mutable_data_ptr(), getCurrentCUDAStream().stream());
  return {std::move(normed), std::move(y),    std::move(packed_codes),
          std::move(found),  std::move(mean), std::move(inverse)};
}

}  // namespace
}  // namespace cg::cuda

namespace cg {

void register_signed_cuda(torch::Library& library) {
  library.impl("qsigned_forward", cuda::qsigned_forward);
  library.impl("qsigned_dequantize", cuda::qsigned_dequantize);
  library.impl("hadamard", cuda::hadamard);
  library.impl("norm_qsigned", cuda::norm_qsigned);
}

}  // namespace cg
