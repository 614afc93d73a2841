// Which kernel of the signed staircase and of the Hadamard rotation runs, as in dispatch.cuh.
#pragma once

#include <bit>

#include "dispatch.cuh"
#include "hadamard.cuh"
#include "signed.cuh"

namespace cg::cuda {

inline bool is_aligned(const SignedForward& a) { return aligned({a.x, a.y}, {a.mask, a.codes}); }

// The threads that share a group: neighbouring lanes or a block, with chunks of their own; or a warp, one by one.
enum class Share { lanes, block, one_by_one };

inline Share share_of(const SignedForward& a) {
  const int64_t chunk = chunk_size(a.dtype), chunks = a.group / chunk;
  if (a.dtype == Dtype::float64 || !is_aligned(a) || a.group % chunk != 0) return Share::one_by_one;
  return chunks <= kWarp && std::has_single_bit(uint64_t(chunks)) ? Share::lanes : Share::block;
}

// Numbers of the compute type that `launch_signed_forward` needs room for.
inline int64_t scratch_count(const SignedForward& a) {
  return a.group > 0 && share_of(a) == Share::one_by_one ? a.count / a.group : 0;
}

template <class T, class Stream>
void launch_given(const SignedForward& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks)));
  const auto run = [&](auto layout) {
    launch(qsigned_forward_kernel<T, layout.value>, grid, dim3(kThreads), 0, stream, a, is_aligned(a));
  };
  if constexpr (kVector<T>) {
    switch (alpha_layout<T>(a)) {
      case AlphaLayout::one: return run(Constant<AlphaLayout::one>{});
      case AlphaLayout::by_chunk: return run(Constant<AlphaLayout::by_chunk>{});
      case AlphaLayout::by_element: break;
    }
  }
  run(Constant<AlphaLayout::by_element>{});
}

template <class T, class Stream>
void launch_dynamic(const SignedForward& a, compute_t<T>* scratch, Stream stream) {
  const Share share = share_of(a);
  const int64_t groups = a.count / a.group;
  if constexpr (kVector<T>) {
    const int64_t chunks = a.group / kChunk<T>;
    if (share == Share::lanes) {
      const dim3 grid(static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks)));
      return launch(qsigned_groups_kernel<T>, grid, dim3(kThreads), 0, stream, a, std::countr_zero(uint64_t(chunks)));
    }
    if (share == Share::block) {
      // Two chunks a thread, if that is enough.
      const auto threads = std::clamp<uint64_t>(std::bit_ceil(uint64_t(chunks)) / 2, kWarp, kMaxRowThreads);
      const dim3 grid(static_cast<unsigned>(std::min(groups, kMaxBlocks)));
      return launch(qsigned_rows_kernel<T>, grid, dim3(static_cast<unsigned>(threads)), 0, stream, a);
    }
  }
  const dim3 grid(static_cast<unsigned>(std::min(divide_up(groups, kThreads / kWarp), kMaxBlocks)));
  launch(qsigned_alphas_kernel<T>, grid, dim3(kThreads), 0, stream, a, scratch);
  SignedForward given = a;
  given.alphas = {scratch, groups, a.group};
  launch_given<T>(given, stream);
}

template <class Stream>
void launch_signed_forward(const SignedForward& a, void* scratch, Stream stream) {
  if (a.count == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.group == 0) return launch_given<T>(a, stream);
    launch_dynamic<T>(a, static_cast<compute_t<T>*>(scratch), stream);
  });
}

template <class Stream>
void launch_signed_dequantize(SignedDequantize a, Stream stream) {
  if (a.count == 0) return;
  const bool dynamic = a.group > 0;
  if (dynamic) a.alphas = {a.group_alphas, a.count / a.group, a.group};
  const dim3 grid(static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks)));
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto stored, auto layout) {
      launch(qsigned_dequantize_kernel<T, typename decltype(stored)::type, layout.value>, grid, dim3(kThreads), 0,
             stream, a, aligned({a.y}, {a.codes}));
    };
    const auto run_stored = [&](auto layout) {
      if (dynamic) run(Tag<bf16>{}, layout);
      else run(Tag<compute_t<T>>{}, layout);
    };
    switch (alpha_layout<T>(a)) {
      case AlphaLayout::one: return run_stored(Constant<AlphaLayout::one>{});
      case AlphaLayout::by_chunk:
        if constexpr (kVector<T>) return run_stored(Constant<AlphaLayout::by_chunk>{});
      case AlphaLayout::by_element: return run_stored(Constant<AlphaLayout::by_element>{});
    }
  });
}

// Of a block within a warp, or within a chunk.
inline bool rotates_in_lanes(const Hadamard& a) {
  const int64_t chunk = chunk_size(a.dtype);
  return a.dtype != Dtype::float64 && aligned({a.x, a.y}, {}) && a.count % chunk == 0 && a.size <= kWarp * chunk;
}
inline int64_t scratch_count(const Hadamard& a) { return rotates_in_lanes(a) ? 0 : a.count; }

template <class Stream>
void launch_hadamard(const Hadamard& a, void* scratch, Stream stream) {
  if (a.count == 0) return;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (kVector<T>) {
      if (rotates_in_lanes(a)) {
        const dim3 grid(static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks)));
        return launch(hadamard_kernel<T>, grid, dim3(kThreads), 0, stream, a);
      }
    }
    const dim3 grid(static_cast<unsigned>(std::min(a.count / a.size, kMaxBlocks)));
    launch(hadamard_any_kernel<T>, grid, dim3(kThreads), 0, stream, a, static_cast<compute_t<T>*>(scratch));
  });
}

}  // namespace cg::cuda
