// The staircase of vectors, for any x.
#pragma once

#include "instruction_set.h"

namespace cg::CG_ISA {
namespace {

template <class T, Rounding R, bool kRegular, class V>
CG_HD Quantized<V> quantize_vec(V x, V alpha, V inverse, V q) {
  if constexpr (kRegular) return quantize<T, R>(x, alpha, inverse, q);
  else return quantize_any<T, R>(x, alpha, q);
}

}  // namespace
}  // namespace cg::CG_ISA
