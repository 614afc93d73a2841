// Codes back to y.
#pragma once

#include "alphas.cuh"

namespace cg::cuda {

template <class T, int kWidth, AlphaLayout kLayout>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dequantize a, bool aligned) {
  using A = compute_t<T>;
  constexpr uint32_t kLow = (1u << kWidth) - 1;
  A only = A(0);
  if constexpr (kLayout == AlphaLayout::one) only = checked(static_cast<const A*>(a.alphas.values)[0]);
  for_each_chunk<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          uint64_t codes[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            codes[u] = read_bits<kChunk<T>, kWidth>(a.codes, first + u * kThreads, kChunk<T>, true);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t chunk = first + u * kThreads;
            if constexpr (kLayout == AlphaLayout::by_chunk) only = checked(alpha_of_chunk<T>(a.alphas, chunk));
            AlphaRun<A> alphas(a.alphas, kLayout == AlphaLayout::by_element ? chunk * kChunk<T> : 0);
            float y[kChunk<T>];
#pragma unroll
            for (int i = 0; i < kChunk<T>; ++i) {
              const float code = static_cast<float>(static_cast<uint32_t>(codes[u] >> (i * kWidth)) & kLow);
              y[i] = mul(code, kLayout == AlphaLayout::by_element ? checked(alphas.next()) : only);
            }
            store_chunk<T>(a.y, chunk, round_chunk<T>(y));
          }
        }
      },
      [&](int64_t chunk, int count) {
        const int64_t start = chunk * kChunk<T>;
        const uint64_t codes = read_bits<kChunk<T>, kWidth>(a.codes, chunk, count, aligned && count == kChunk<T>);
        AlphaRun<A> alphas(a.alphas, start);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const A code = A(static_cast<uint32_t>(codes >> (i * kWidth)) & kLow);
          static_cast<T*>(a.y)[start + i] = narrow<T>(mul(code, checked(alphas.next())));
        }
      });
}

}  // namespace cg::cuda
