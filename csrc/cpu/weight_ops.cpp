// The scale of quantized weights: checks, rows, and the kernel of the instruction set in use.
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "../register.h"
#include "isa.h"
#include "tensors.h"

namespace cg {
namespace {

using at::Tensor;

Tensor weight_scale(const Tensor& weight, int64_t bits, std::optional<int64_t> channel_dim) {
  WeightScale a{};
  a.dtype = dtype_of(weight, "weight");
  a.bits = static_cast<int>(bits);
  const auto [dense, rows, length] = weight_rows(weight, bits, channel_dim);
  a.rows = rows, a.length = length;
  a.weight = dense.const_data_ptr();
  const auto wide = a.dtype == Dtype::float64 ? at::kDouble : at::kFloat;
  const Tensor scale = at::detail::empty_cpu(channel_dim ? at::IntArrayRef(a.rows) : at::IntArrayRef(), wide);
  a.scale = scale.mutable_data_ptr();
  const auto run = active_kernels<Kernels>().signed_kernels.weight_scales;
  const int64_t grain = std::max<int64_t>(1, kGrainBlocks * kBlock / 16 / std::max<int64_t>(a.length, 1));
  at::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t padded = block_total(a.length) * kBlock;
    const Tensor magnitudes = at::detail::empty_cpu({padded}, at::kInt);
    const Tensor more = at::detail::empty_cpu({bits == 1 ? 0 : padded}, bits == 2 ? at::kInt : at::kShort);
    run(a, begin, end, magnitudes.mutable_data_ptr<int32_t>(), more.mutable_data_ptr());
  });
  return scale;
}

}  // namespace

void register_weights_cpu(torch::Library& library) { library.impl("weight_scale", weight_scale); }

}  // namespace cg
