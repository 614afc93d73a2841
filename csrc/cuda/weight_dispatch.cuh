// How the kernels of the scale of weights are launched, as in dispatch.cuh.
#pragma once

#include "dispatch.cuh"
#include "weights.cuh"

namespace cg::cuda {

// The pairs of sums in WeightSums::tried of each row.
inline int64_t tried_count(const WeightScale& a) {
  return a.bits == 1 ? 0 : a.bits == 2 ? divide_up(a.length, kSortedPart) : weight_grid(a.bits).count;
}

// sort(s) sorts the magnitudes of two bits, and finds their sums.
template <class Sort, class Stream>
void launch_weight_scale(const WeightScale& a, WeightSums s, const Sort& sort, Stream stream) {
  if (a.rows == 0) return;
  const auto rows = static_cast<unsigned>(a.rows), parts = static_cast<unsigned>(divide_up(a.length, kPart));
  const auto run = [&](auto kernel, dim3 grid, const auto&... more) {
    launch(kernel, grid, dim3(kThreads), 0, stream, a, s, more...);
  };
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (parts > 0) {
      run(weight_largest_kernel<T>, dim3(rows, parts));
      if (a.bits == 2) {
        run(weight_magnitudes_kernel<T>, dim3(rows, parts));
        sort(s);
        run(weight_ternary_kernel, dim3(rows, static_cast<unsigned>(divide_up(s.tried_count, kWarps))));
      } else {
        const WeightGrid grid = a.bits == 1 ? WeightGrid{} : weight_grid(a.bits);
        const auto groups = static_cast<unsigned>(divide_up(grid.count, kTried));
        if (groups > 0) run(weight_search_kernel<T>, dim3(rows, parts * groups), grid);
        run(weight_sums_kernel<T>, dim3(rows, parts), grid);
      }
    }
    run(weight_scale_kernel<T>, dim3(static_cast<unsigned>(divide_up(a.rows, kThreads))));
  });
}

}  // namespace cg::cuda
