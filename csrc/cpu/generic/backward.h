// dy to dx and to the sums of dalpha.
#pragma once

#include "backward_saved.h"
#include "backward_x.h"

namespace cg::CG_ISA {
namespace {

void backward(const Backward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if (!a.x) return backward_saved<T>(a, begin, end);
    with_ste(a.ste, [&](auto ste) { backward_x<T, typename decltype(ste)::type>(a, begin, end); });
  });
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
