// Hadamard's rotation of blocks of x.
#pragma once

#include "blocks.h"

namespace cg::CG_ISA {
namespace {

// One stage of the butterfly: each pair of numbers that are `half` apart, in runs of `half`.
template <class A>
CG_HD void butterfly(A* v, int64_t count, int64_t half) {
  using V = Vec<A>;
  for (int64_t run = 0; run < count; run += 2 * half) {
    A *const low = v + run, *const high = low + half;
    if (half < Lanes<V>::kCount) {
      for (int64_t i = 0; i < half; ++i) {
        const A a = low[i], b = high[i];
        low[i] = a + b, high[i] = a - b;
      }
    } else {
      for (int64_t i = 0; i < half; i += Lanes<V>::kCount) {
        const V a = Io<A>::load(low + i), b = Io<A>::load(high + i);
        Io<A>::store(low + i, a + b), Io<A>::store(high + i, a - b);
      }
    }
  }
}

template <class T>
CG_HD void hadamard_tile_of(const Hadamard& a, const T* x, T* y, int64_t tile, compute_t<T>* v) {
  using V = Vec<compute_t<T>>;
  for (int64_t i = 0; i < tile; i += Lanes<V>::kCount) Io<compute_t<T>>::store(v + i, Io<T>::load(x + i));
  for (int64_t half = 1; half < a.size; half *= 2) butterfly(v, tile, half);
  const V scale(static_cast<compute_t<T>>(a.scale));
  for (int64_t i = 0; i < tile; i += Lanes<V>::kCount) {
    Io<T>::store(y + i, round_for_store<T>(mul(Io<compute_t<T>>::load(v + i), scale)));
  }
}

void hadamard(const Hadamard& args, int64_t begin, int64_t end, void* scratch) {
  const Hadamard a = args;
  const int64_t tile = hadamard_tile(a.size);
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    compute_t<T>* const v = static_cast<compute_t<T>*>(scratch);
    for (int64_t at = begin * tile; at < end * tile; at += tile) {
      const T* const x = static_cast<const T*>(a.x) + at;
      T* const y = static_cast<T*>(a.y) + at;
      if (const int64_t left = a.count - at; left >= tile) {
        hadamard_tile_of(a, x, y, tile, v);
      } else {  // of small blocks
        T copy[kBlock] = {};
        memcpy(copy, x, left * sizeof(T));
        hadamard_tile_of(a, copy, copy, kBlock, v);
        memcpy(y, copy, left * sizeof(T));
      }
    }
  });
}

}  // namespace
}  // namespace cg::CG_ISA
