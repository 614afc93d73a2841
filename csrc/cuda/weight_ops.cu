// The scale of quantized weights on CUDA tensors, as in ops.cu.
#include <ATen/ops/cumsum.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "../register.h"
#include "launch.cuh"
#include "tensors.h"

#include "weight_dispatch.cuh"

namespace cg::cuda {
namespace {

// The weights that are sorted at once, with 16 bytes for each, but for a longer row.
constexpr int64_t kSorted = 1 << 24;

void find_scales(const WeightScale& a, const Tensor& like) {
  const auto options = like.options().dtype(at::kLong);
  const int64_t tried = tried_count(a);
  const Tensor sums = at::zeros({a.rows * (1 + 2 * tried + 2)}, options);
  WeightSums s{};
  s.tried = reinterpret_cast<Quotient*>(sums.mutable_data_ptr<int64_t>());
  s.tried_count = tried;
  s.found = s.tried + a.rows * tried;
  s.largest = reinterpret_cast<unsigned long long*>(s.found + a.rows);
  Tensor magnitudes, totals;
  if (a.bits == 2) {
    magnitudes = at::empty({a.rows, a.length}, options.dtype(at::kInt));
    s.magnitudes = magnitudes.mutable_data_ptr<int32_t>();
  }
  const auto sort = [&](WeightSums& of) {
    magnitudes = std::get<0>(at::sort(magnitudes, 1, true));
    totals = at::cumsum(magnitudes, 1, at::kLong);
    of.magnitudes = magnitudes.mutable_data_ptr<int32_t>();
    of.totals = totals.const_data_ptr<int64_t>();
  };
  launch_weight_scale(a, s, sort, getCurrentCUDAStream().stream());
}

Tensor weight_scale(const Tensor& weight, int64_t bits, std::optional<int64_t> channel_dim) {
  const CUDAGuard guard(weight.device());
  WeightScale a{};
  a.dtype = dtype_of(weight, "weight");
  a.bits = static_cast<int>(bits);
  const auto [dense, rows, length] = weight_rows(weight, bits, channel_dim);
  a.length = length;
  const Tensor scale =
      at::empty(channel_dim ? at::IntArrayRef(rows) : at::IntArrayRef(), dense.options().dtype(compute_type(a.dtype)));
  const int64_t step = bits == 2 ? std::max<int64_t>(1, kSorted / std::max<int64_t>(a.length, 1)) : rows;
  for (int64_t first = 0; first < rows; first += step) {
    a.rows = std::min(step, rows - first);
    a.weight = static_cast<const char*>(dense.const_data_ptr()) + first * a.length * dense.element_size();
    a.scale = static_cast<char*>(scale.mutable_data_ptr()) + first * scale.element_size();
    find_scales(a, dense);
  }
  return scale;
}

}  // namespace
}  // namespace cg::cuda

namespace cg {

void register_weights_cuda(torch::Library& library) { library.impl("weight_scale", cuda::weight_scale); }

}  // namespace cg
