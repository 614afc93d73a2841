// Sums in a fixed order and in two stages: a partial sum per block, then one over the blocks. No float atomics. And the
// largest of integers.
#pragma once

#include "chunk.cuh"

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

// How the elements of many channels are shared for their sums; blockIdx.y is the slice. If channels are the innermost
// dimension, a lane has kUnit channels from `channel` on and a warp has a row; else a block has one channel.
template <int kUnit>
struct ChannelShare {
  bool innermost;
  int64_t channel, first, alpha_of;

  CG_D explicit ChannelShare(const Alphas& alphas) : innermost(alphas.inner == 1) {
    const int each = innermost ? kThreads / kWarp : kThreads;
    const int mine = innermost ? threadIdx.x / kWarp : threadIdx.x;
    channel = innermost ? (int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp) * kUnit : blockIdx.x;
    first = int64_t{blockIdx.y} * each + mine;
    alpha_of = int64_t{gridDim.y} * each;
  }
};

// partial[slice, channel] = the sum over the slice's elements of the channel. They are read in units of kUnit
// consecutive ones, each once: with_terms(channel, loop) calls loop(terms), where terms.add(unit, terms.load(unit),
// total) adds to total[k] the term of the unit's element k, which is of `channel`, or of channel + k where the channel
// is the innermost dimension.
template <int kUnit, class A, class WithTerms>
CG_D void sum_channel(const Alphas& alphas, int64_t count, A* partial, const WithTerms& with_terms) {
  const ChannelShare<kUnit> share(alphas);
  A total[kUnit] = {};
  if (share.channel < alphas.channels) {
    const int64_t inner = share.innermost ? 1 : alphas.inner / kUnit;
    const int64_t row = share.innermost ? alphas.channels / kUnit : alphas.channels * inner;
    const int64_t start = share.innermost ? share.channel / kUnit : share.channel * inner;
    // first and alpha_of are below 2^32, as a grid has fewer threads: no 64-bit division, which is a call and spills.
    const auto runs = [&](int64_t units) {
      return inner > units ? 0u : static_cast<uint32_t>(units) / static_cast<uint32_t>(inner);
    };
    const int64_t step_outer = runs(share.alpha_of), step_at = share.alpha_of - step_outer * inner, end = count / kUnit;
    int64_t outer = runs(share.first), at = share.first - outer * inner;
    const auto next = [&] {
      const int64_t unit = outer * row + start + at;
      outer += step_outer;
      at += step_at;
      if (at >= inner) at -= inner, ++outer;
      return unit;
    };
    with_terms(share.channel, [&](const auto& terms) {
      // Two at a time, so that both loads are issued before the first is used.
      while (outer * row < end) {
        const int64_t first = next();
        const bool more = outer * row < end;
        const int64_t second = more ? next() : first;
        const auto one = terms.load(first), two = terms.load(second);
        terms.add(first, one, total);
        if (more) terms.add(second, two, total);
      }
    });
  }
  A* to = partial + blockIdx.y * alphas.channels + share.channel;
  if (share.innermost) {
    CG_SHARED(A, sums, kUnit * kThreads);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) sums[k * kThreads + threadIdx.x] = total[k];
    __syncthreads();
    if (threadIdx.x < kWarp && share.channel < alphas.channels) {
#pragma unroll 1
      for (int k = 0; k < kUnit; ++k) {
        A sum = A(0);
        for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += sums[k * kThreads + warp * kWarp + threadIdx.x];
        to[k] = sum;
      }
    }
  } else {
    A sum = A(0);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) sum += total[k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *to = sum;
  }
}

// The second stage: a block has a channel. grad_alpha[channel] = scale * sum over slices of partial[slice, channel].
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_slices_kernel(const A* partial, int64_t slices, int64_t channels, double scale, A* grad_alpha) {
  const int64_t channel = blockIdx.x;
  A total = A(0);
  for (int64_t slice = threadIdx.x; slice < slices; slice += kThreads) total += partial[slice * channels + channel];
  total = block_sum(total);
  if (threadIdx.x == 0) grad_alpha[channel] = static_cast<A>(total * scale);
}

template <class Bits>
CG_D Bits larger(Bits a, Bits b) {
  return a > b ? a : b;
}
// The largest v[u] of each `lanes` neighbours in a warp, a power of two, for all of them.
template <class Bits, int kCount>
CG_D void largest_of_lanes(Bits (&v)[kCount], int lanes) {
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    if (apart < lanes) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) v[u] = larger(v[u], __shfl_xor_sync(0xffffffffu, v[u], apart));
    }
  }
}
template <class Bits>
CG_D Bits largest_of_warp(Bits v) {
  Bits all[] = {v};
  largest_of_lanes(all, kWarp);
  return all[0];
}
// The largest of a block, for all of its threads.
CG_D uint32_t largest_of_block(uint32_t v) {
  CG_SHARED(uint32_t, of_warps, kWarp);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  v = largest_of_warp(v);
  if (lane == 0) of_warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = largest_of_warp(lane < warps ? of_warps[lane] : 0);
  __syncthreads();  // before the next call writes
  return v;
}

}  // namespace cg::cuda
