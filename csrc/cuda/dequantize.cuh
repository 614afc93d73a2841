// Codes back to y.
#pragma once

#include "steps.cuh"

namespace cg::cuda {

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dequantize a, bool aligned) {
  using A = compute_t<T>;
  constexpr uint32_t kLow = (1u << kWidth) - 1;
  const bool one_channel = a.steps.channels == 1;
  A only = A(0);
  if (one_channel) only = checked(static_cast<const A*>(a.steps.alpha)[0]);
  for_each_pack<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          uint64_t codes[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            codes[u] = read_bits<kPack<T>, kWidth>(a.codes, first + u * kThreads, kPack<T>, true);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t pack = first + u * kThreads;
            float y[kPack<T>];
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) y[i] = static_cast<float>(static_cast<uint32_t>(codes[u] >> (i * kWidth)) & kLow);
            if (one_channel) {
#pragma unroll
              for (int i = 0; i < kPack<T>; ++i) y[i] = mul(y[i], only);
            } else {
              Run<A> alphas(a.steps, pack * kPack<T>);
#pragma unroll
              for (int i = 0; i < kPack<T>; ++i) y[i] = mul(y[i], checked(alphas.next()));
            }
            store_words<T>(a.y, pack, round_all<T>(y));
          }
        }
      },
      [&](int64_t pack, int count) {
        const int64_t start = pack * kPack<T>;
        const uint64_t codes = read_bits<kPack<T>, kWidth>(a.codes, pack, count, aligned && count == kPack<T>);
        Run<A> alphas(a.steps, start);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const A code = A(static_cast<uint32_t>(codes >> (i * kWidth)) & kLow);
          static_cast<T*>(a.y)[start + i] = narrow<T>(mul(code, checked(alphas.next())));
        }
      });
}

}  // namespace cg::cuda
