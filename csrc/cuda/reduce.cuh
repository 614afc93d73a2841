// Sums in a fixed order and in two stages: a partial sum per block, then one over the blocks. No float atomics.
#pragma once

#include "vec.cuh"

#ifndef CG_SHARED
#define CG_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace cg::cuda {

// The sum over a warp, for lane 0.
template <class A>
CG_D A warp_sum(A v) {
#pragma unroll
  for (int down = kWarp / 2; down > 0; down /= 2) v += __shfl_down_sync(0xffffffffu, v, down);
  return v;
}

// The sum over the block, for thread 0. All threads call it, once.
template <class A>
CG_D A block_sum(A v) {
  constexpr int kWarps = kThreads / kWarp;
  CG_SHARED(A, sums, kWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) sums[warp] = v;
  __syncthreads();
  if (warp == 0) v = warp_sum(lane < kWarps ? sums[lane] : A(0));
  return v;
}

// partial[block] = the sum over the block.
template <class A>
CG_D void sum_blocks(A total, A* partial) {
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// How the elements of many channels are shared out for their sums: blockIdx.y is the slice. Where the channel is the
// innermost dimension a lane has a channel and a warp a row; else a block has one channel.
struct ChannelShare {
  bool inner_most;
  int64_t channel, first, step;

  CG_D explicit ChannelShare(const Steps& steps) : inner_most(steps.inner == 1) {
    const int each = inner_most ? kThreads / kWarp : kThreads;
    const int mine = inner_most ? threadIdx.x / kWarp : threadIdx.x;
    channel = inner_most ? int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp : blockIdx.x;
    first = int64_t{blockIdx.y} * each + mine;
    step = int64_t{gridDim.y} * each;
  }
};

// partial[slice, channel] = the sum of term(i, channel) over the slice's elements i of the channel.
template <class A, class Term>
CG_D void sum_channel(const Steps& steps, int64_t count, A* partial, const Term& term) {
  const ChannelShare share(steps);
  A total = A(0);
  if (share.channel < steps.channels) {
    // first and step are below 2^32, as a grid has fewer threads: no 64-bit division, which is a call and spills.
    const auto runs = [&](int64_t elements) {
      return steps.inner > elements ? 0u : static_cast<uint32_t>(elements) / static_cast<uint32_t>(steps.inner);
    };
    const int64_t row = steps.channels * steps.inner, step_outer = runs(share.step),
                  step_at = share.step - step_outer * steps.inner;
    int64_t outer = runs(share.first), at = share.first - outer * steps.inner;
    while (outer * row < count) {
      total += term(outer * row + share.channel * steps.inner + at, share.channel);
      outer += step_outer;
      at += step_at;
      if (at >= steps.inner) at -= steps.inner, ++outer;
    }
  }
  A* to = partial + blockIdx.y * steps.channels + share.channel;
  if (share.inner_most) {
    CG_SHARED(A, sums, kThreads);
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x < kWarp && share.channel < steps.channels) {
      total = A(0);
      for (int warp = 0; warp < kThreads / kWarp; ++warp) total += sums[warp * kWarp + threadIdx.x];
      *to = total;
    }
  } else {
    total = block_sum(total);
    if (threadIdx.x == 0) *to = total;
  }
}

// The second stage: a warp has a channel. grad_alpha[channel] = scale * sum over slices of partial[slice, channel].
template <class A>
__global__ void __launch_bounds__(kThreads) sum_slices_kernel(const A* partial, int64_t slices, int64_t channels,
                                                              double scale, A* grad_alpha) {
  const int64_t channel = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  A total = A(0);
  if (channel < channels) {
    for (int64_t slice = lane; slice < slices; slice += kWarp) total += partial[slice * channels + channel];
  }
  total = warp_sum(total);
  if (lane == 0 && channel < channels) grad_alpha[channel] = static_cast<A>(total * scale);
}

}  // namespace cg::cuda
