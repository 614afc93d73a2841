// Copies float32.
#pragma once

#include "instruction_set.h"

namespace cg::CG_ISA {
namespace {

// The yardstick of the other kernels: their loads and stores with nothing in between.
void copy(const Copy& args, int64_t begin, int64_t end) {
  const Copy a = args;
  for (int64_t block = begin; block < end; ++block) {
    const float* from = a.from + block * kBlock;
    float* to = a.to + block * kBlock;
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; i += Lanes<Vec<float>>::kCount) {
      const auto v = Io<float>::load(from + i);
      if (a.stream) Io<float>::stream(to + i, v);
      else Io<float>::store(to + i, v);
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
