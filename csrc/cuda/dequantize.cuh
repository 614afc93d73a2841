// Codes back to y.
#pragma once

#include "steps.cuh"

namespace cg::cuda {

template <class T, int kWidth, Alphas kAlphas>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Dequantize a, bool aligned) {
  using A = compute_t<T>;
  constexpr uint32_t kLow = (1u << kWidth) - 1;
  A only = A(0);
  if constexpr (kAlphas == Alphas::one) only = checked(static_cast<const A*>(a.steps.alpha)[0]);
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
            if constexpr (kAlphas == Alphas::by_pack) only = checked(alpha_of_pack<T>(a.steps, pack));
            Run<A> alphas(a.steps, kAlphas == Alphas::by_element ? pack * kPack<T> : 0);
            float y[kPack<T>];
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) {
              const float code = static_cast<float>(static_cast<uint32_t>(codes[u] >> (i * kWidth)) & kLow);
              y[i] = mul(code, kAlphas == Alphas::by_element ? checked(alphas.next()) : only);
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
