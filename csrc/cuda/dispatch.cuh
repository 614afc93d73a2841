// Which kernel runs, and on how many blocks. Grid sizes are functions of the shape alone, so that sums are the same on
// every device. The including file provides
//   launch(kernel, grid, block, dynamic shared bytes, stream, arguments...)
#pragma once

#include <algorithm>
#include <initializer_list>

#include "../dispatch.h"
#include "backward.cuh"
#include "dequantize.cuh"
#include "forward.cuh"

namespace cg::cuda {

// Upper bound on the blocks of an elementwise kernel: a tile each, as the next block's loads overlap with the last
// one's stores and a next tile's do not.
constexpr int64_t kMaxBlocks = 1 << 30;
// Partial sums: the upper bound for one alpha, and the number of blocks to aim for with many.
constexpr int64_t kMaxSums = 4096, kSumBlocks = 4096;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t chunk_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return kChunk<float>;
    case Dtype::float64: return kChunk<double>;
    default: return kChunk<bf16>;
  }
}

// Blocks for `count` elements, a tile of whole chunks each, up to `most`.
inline int64_t chunk_blocks(Dtype dtype, int64_t count, int64_t most) {
  return std::min(divide_up(count, chunk_size(dtype) * kThreads * kUnroll), most);
}

// Whether a kernel may move whole chunks: of elements by 16 bytes, of packed bits by up to 8.
inline bool aligned(std::initializer_list<const void*> elements, std::initializer_list<const void*> bits) {
  uintptr_t low = 0;
  for (const void* p : elements) low |= reinterpret_cast<uintptr_t>(p);
  for (const void* p : bits) low |= reinterpret_cast<uintptr_t>(p) << 1;
  return low % 16 == 0;
}

template <class T, class Params>
AlphaLayout alpha_layout(const Params& a) {
  if (a.alphas.channels == 1) return AlphaLayout::one;
  const bool whole = kVector<T> && a.alphas.inner % kChunk<T> == 0 && a.count / kChunk<T> <= UINT32_MAX;
  return whole ? AlphaLayout::by_chunk : AlphaLayout::by_element;
}

template <class Stream>
void launch_forward(const Forward& a, Stream stream) {
  if (a.count == 0) return;
  const unsigned blocks = static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks));
  const bool whole = aligned({a.x, a.y}, {a.mask, a.codes});
  const auto run = [&](auto kernel) { launch(kernel, dim3(blocks), dim3(kThreads), 0, stream, a, whole); };
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_rounding(a.rounding, [&](auto rounding) {
      constexpr Rounding R = rounding.value;
      if constexpr (kVector<T>) {
        const auto run_kind = [&](auto kind) {
          if (a.codes) run(qrelu_forward_kernel<T, R, kind.value, true>);
          else run(qrelu_forward_kernel<T, R, kind.value, false>);
        };
        if (a.alphas.channels == 1) {
          switch (a.kind) {
            case MaskKind::nothing: return run_kind(Constant<MaskKind::nothing>{});
            case MaskKind::positive: return run_kind(Constant<MaskKind::positive>{});
            case MaskKind::inside: return run_kind(Constant<MaskKind::inside>{});
            case MaskKind::state: return run_kind(Constant<MaskKind::state>{});
            case MaskKind::near: return run_kind(Constant<MaskKind::near>{});
          }
        }
      }
      if constexpr (kVector<T>) {
        if (alpha_layout<T>(a) == AlphaLayout::by_chunk) return run(qrelu_forward_channels_kernel<T, R, true>);
      }
      run(qrelu_forward_channels_kernel<T, R, false>);
    });
  });
}

template <class Stream>
void launch_dequantize(const Dequantize& a, Stream stream) {
  if (a.count == 0) return;
  const unsigned blocks = static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks));
  const bool whole = aligned({a.y}, {a.codes});
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width(packed_width(a.bits), [&](auto width) {
      const auto run = [&](auto alphas) {
        launch(dequantize_kernel<T, width.value, alphas.value>, dim3(blocks), dim3(kThreads), 0, stream, a, whole);
      };
      switch (alpha_layout<T>(a)) {
        case AlphaLayout::one: return run(Constant<AlphaLayout::one>{});
        case AlphaLayout::by_chunk:
          if constexpr (kVector<T>) return run(Constant<AlphaLayout::by_chunk>{});
        case AlphaLayout::by_element: return run(Constant<AlphaLayout::by_element>{});
      }
    });
  });
}

template <class Stream>
void launch_backward_from_slopes(const BackwardFromSlopes& a, Stream stream) {
  if (a.count == 0) return;
  const unsigned blocks = static_cast<unsigned>(chunk_blocks(a.dtype, a.count, kMaxBlocks));
  const bool whole = aligned({a.grad_y, a.grad_x}, {a.codes});
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_width(packed_width(a.bits), [&](auto width) {
      launch(backward_from_slopes_kernel<T, width.value>, dim3(blocks), dim3(kThreads), 0, stream, a, whole);
    });
  });
}

// Elements that the per-channel sums read at once: a chunk, if each lies within a channel or a row of channels.
inline int64_t channel_unit(const Backward& a) {
  const int64_t chunk = chunk_size(a.dtype), run = a.alphas.inner == 1 ? a.alphas.channels : a.alphas.inner;
  const bool whole =
      a.dtype != Dtype::float64 && run % chunk == 0 && aligned({a.grad_y, a.grad_x, a.x}, {a.mask, a.codes});
  return whole ? chunk : 1;
}

// The grid of the per-channel sums: groups of channels by slices of their elements.
inline dim3 channel_grid(const Backward& a) {
  const bool innermost = a.alphas.inner == 1;
  const int64_t unit = channel_unit(a),
                groups = innermost ? divide_up(a.alphas.channels, kWarp * unit) : a.alphas.channels;
  const int64_t each = a.count / a.alphas.channels / (innermost ? 1 : unit),
                threads = innermost ? kThreads / kWarp : kThreads;
  const int64_t slices = std::clamp<int64_t>(kSumBlocks / groups, 1, divide_up(each, 8 * threads));
  return dim3(static_cast<unsigned>(groups), static_cast<unsigned>(slices));
}

// Slices of the first stage of the sums of dalpha.
inline int64_t sum_slices(const Backward& a) {
  if (a.count == 0) return 0;
  return a.alphas.channels == 1 ? chunk_blocks(a.dtype, a.count, kMaxSums) : channel_grid(a).y;
}

// The size of Backward::partial, in numbers of the compute type.
inline int64_t partial_count(const Backward& a) { return sum_slices(a) * a.alphas.channels; }

template <class T, class Body>
void with_unit(const Backward& a, const Body& body) {
  if constexpr (kVector<T>) {
    if (channel_unit(a) > 1) return body(Constant<kChunk<T>>{});
  }
  body(Constant<1>{});
}

// Many alphas have a kernel of their own, which does everything.
inline bool sums_channels(const Backward& a) { return a.grad_alpha && a.alphas.channels > 1; }

template <class T, class Stream>
void launch_backward_x(const Backward& a, Stream stream, dim3 grid, bool whole) {
  const auto run = [&](auto ste) {
    using SteT = typename decltype(ste)::type;
    const auto sum = [&](auto unit, auto innermost) {
      launch(qrelu_backward_x_channels_kernel<T, SteT, unit.value, innermost.value>, channel_grid(a), dim3(kThreads), 0,
             stream, a);
    };
    const auto map = [&](auto alphas) {
      launch(qrelu_backward_x_kernel<T, SteT, alphas.value>, grid, dim3(kThreads), 0, stream, a, whole);
    };
    if (sums_channels(a)) {
      return with_unit<T>(a, [&](auto unit) {
        if constexpr (unit.value > 1) {
          if (a.alphas.inner == 1) return sum(unit, Constant<true>{});
        }
        sum(unit, Constant<false>{});
      });
    }
    switch (alpha_layout<T>(a)) {
      case AlphaLayout::one: return map(Constant<AlphaLayout::one>{});
      case AlphaLayout::by_chunk:
        if constexpr (kVector<T>) return map(Constant<AlphaLayout::by_chunk>{});
      case AlphaLayout::by_element: return map(Constant<AlphaLayout::by_element>{});
    }
  };
  with_ste(a.ste, run);
}

template <class T, bool kState, int kWidth, class Stream>
void launch_backward_saved(const Backward& a, Stream stream, dim3 grid, bool whole) {
  if (sums_channels(a)) {
    return with_unit<T>(a, [&](auto unit) {
      launch(qrelu_backward_saved_channels_kernel<T, kState, kWidth, unit.value>, channel_grid(a), dim3(kThreads), 0,
             stream, a);
    });
  }
  launch(qrelu_backward_saved_kernel<T, kState, kWidth>, grid, dim3(kThreads), 0, stream, a, whole);
}

template <class Stream>
void launch_backward(const Backward& a, Stream stream) {
  const int64_t most = a.grad_alpha && a.alphas.channels == 1 ? kMaxSums : kMaxBlocks;
  const dim3 grid(static_cast<unsigned>(chunk_blocks(a.dtype, a.count, most)));
  const bool whole = aligned({a.grad_y, a.grad_x, a.x}, {a.mask, a.codes});
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (a.count == 0) {
    } else if (a.x) {
      launch_backward_x<T>(a, stream, grid, whole);
    } else if (a.codes) {
      with_width(packed_width(a.bits),
                 [&](auto width) { launch_backward_saved<T, false, width.value>(a, stream, grid, whole); });
    } else if (a.kind == MaskKind::state) {
      launch_backward_saved<T, true, 2>(a, stream, grid, whole);
    } else if (a.kind != MaskKind::nothing) {
      launch(qrelu_backward_mask_kernel<bytes_t<sizeof(T)>>, grid, dim3(kThreads), 0, stream, a, whole);
    }
    if (a.grad_alpha) {
      using A = compute_t<T>;
      launch(sum_slices_kernel<A>, dim3(static_cast<unsigned>(a.alphas.channels)), dim3(kThreads), 0, stream,
             static_cast<const A*>(a.partial), sum_slices(a), a.alphas.channels, a.scale,
             static_cast<A*>(a.grad_alpha));
    }
  });
}

}  // namespace cg::cuda
