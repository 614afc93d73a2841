// Which kernels of a norm and its staircase run, as in dispatch.cuh.
#pragma once

#include "norm.cuh"
#include "signed_dispatch.cuh"

namespace cg::cuda {

inline int64_t row_threads(const Norm& a) {
  return std::clamp<int64_t>(std::bit_ceil(uint64_t(divide_up(a.length, kOwnLanes))), kLeastRowThreads, kThreads);
}

inline bool in_chunks(const NormStaircase& a) {
  const Norm& n = a.norm;
  return n.dtype != Dtype::float64 && n.length % chunk_size(n.dtype) == 0 &&
         aligned({n.x, n.weight, n.bias, n.out, a.staircase.y}, {a.staircase.codes});
}

// Whether the norm's kernel computes the staircase too: if groups and the rotation's blocks are within a warp, or a
// group is a row.
inline bool in_one_kernel(const NormStaircase& a) {
  const int64_t chunk = chunk_size(a.norm.dtype), lanes = std::min<int64_t>(row_threads(a.norm), kWarp);
  const int64_t group = a.staircase.group, chunks = group / chunk;
  const bool within = group % chunk == 0 && chunks <= lanes && std::has_single_bit(uint64_t(chunks));
  return in_chunks(a) && (group == a.norm.length || within) && a.rotation.size <= lanes * chunk;
}

// Numbers of the compute type that `launch_norm` needs room for.
inline int64_t scratch_count(const NormStaircase& a) {
  if (a.staircase.count == 0 || in_one_kernel(a)) return 0;
  return std::max(a.rotation.size > 0 ? a.rotation.count : 0, a.staircase.count / a.staircase.group);
}

template <class Stream>
void launch_norm_kernel(const NormStaircase& a, Stream stream) {
  const int64_t threads = row_threads(a.norm), block = threads > kWarp ? threads : kThreads;
  const dim3 grid(static_cast<unsigned>(std::min(divide_up(a.norm.rows, block / threads), kMaxBlocks)));
  const auto log2_of = [](int64_t v) { return v > 0 ? std::countr_zero(uint64_t(v)) : 0; };
  const int group_shift = log2_of(a.staircase.group / chunk_size(a.norm.dtype));
  const auto run = [&](auto kernel) {
    launch(kernel, grid, dim3(static_cast<unsigned>(block)), 0, stream, a, log2_of(threads), group_shift);
  };
  with_dtype(a.norm.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (kVector<T>) {
      if (in_chunks(a)) {
        if (a.norm.length <= kNormLanes) return run(norm_kernel<T, kChunk<T>, true>);
        return run(norm_kernel<T, kChunk<T>, false>);
      }
    }
    run(norm_kernel<T, 1, false>);
  });
}

template <class Stream>
void launch_norm(NormStaircase a, void* scratch, Stream stream) {
  if (a.norm.rows == 0) return;
  if (a.staircase.count == 0 || in_one_kernel(a)) {
    a.staircase.x = a.staircase.y;
    return launch_norm_kernel(a, stream);
  }
  SignedForward after = a.staircase;
  a.staircase.count = 0;
  if (!a.norm.out) a.norm.out = after.y;
  launch_norm_kernel(a, stream);
  after.x = a.norm.out;
  if (a.rotation.size > 0) {
    a.rotation.x = after.x;
    a.rotation.y = after.y;
    launch_hadamard(a.rotation, scratch, stream);
    after.x = after.y;
  }
  launch_signed_forward(after, scratch, stream);
}

}  // namespace cg::cuda
