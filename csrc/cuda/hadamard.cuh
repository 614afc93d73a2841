// The Hadamard rotation: a butterfly, whose order of sums docs/spec.md fixes.
#pragma once

#include "chunk.cuh"

namespace cg::cuda {

// The stages of the butterfly within a chunk, for blocks of `size` elements.
template <class T>
CG_D void rotate_chunk(float (&v)[kChunk<T>], int size) {
#pragma unroll
  for (int half = 1; half < kChunk<T>; half *= 2) {
    if (half < size) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        if (i & half) continue;
        const float low = v[i], high = v[i + half];
        v[i] = low + high;
        v[i + half] = low - high;
      }
    }
  }
}

// Blocks of up to a warp's chunks, by the lanes that have them: the same one of kCount chunks of each.
template <class T, int kCount>
CG_D void rotate_chunks(float (&v)[kCount][kChunk<T>], int size, float scale) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) rotate_chunk<T>(v[u], size);
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    if (apart * kChunk<T> < size) {
      const float sign = threadIdx.x & apart ? -1 : 1;  // the fma is a sum
#pragma unroll
      for (int i = 0; i < kCount * kChunk<T>; ++i) {
        float& own = v[i / kChunk<T>][i % kChunk<T>];
        own = __fmaf_rn(own, sign, __shfl_xor_sync(0xffffffffu, own, apart));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount * kChunk<T>; ++i) {
    float& own = v[i / kChunk<T>][i % kChunk<T>];
    own = mul(own, scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) hadamard_kernel(const Hadamard a) {
  const int size = static_cast<int>(a.size);
  const float scale = static_cast<float>(a.scale);
  const int64_t chunks = a.count / kChunk<T>;
  for_each_whole_chunk<T>(a.x, chunks, [&](int64_t first, const Chunk(&words)[kUnroll]) {
    float v[kUnroll][kChunk<T>];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) widen_chunk<T>(words[u], v[u]);
    rotate_chunks<T>(v, size, scale);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t chunk = first + u * kThreads;
      if (chunk < chunks) store_chunk<T>(a.y, chunk, round_chunk<T>(v[u]));
    }
  });
}

// Any blocks, each by a thread block. all_sums has room for every element.
template <class T>
__global__ void __launch_bounds__(kThreads) hadamard_any_kernel(const Hadamard a, compute_t<T>* all_sums) {
  using A = compute_t<T>;
  for (int64_t start = blockIdx.x * a.size; start < a.count; start += gridDim.x * a.size) {
    A* const sums = all_sums + start;
    for (int64_t i = threadIdx.x; i < a.size; i += kThreads) sums[i] = widen(static_cast<const T*>(a.x)[start + i]);
    for (int64_t half = 1; half < a.size; half *= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x; pair < a.size / 2; pair += kThreads) {
        const int64_t at = 2 * pair - (pair & (half - 1));
        const A low = sums[at], high = sums[at + half];
        sums[at] = low + high;
        sums[at + half] = low - high;
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a.size; i += kThreads) {
      static_cast<T*>(a.y)[start + i] = narrow<T>(mul(sums[i], static_cast<A>(a.scale)));
    }
  }
}

}  // namespace cg::cuda
