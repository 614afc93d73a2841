// From values known at run time to template arguments: body(Tag<T>{}) or body(Constant<value>{}).
#pragma once

#include "math/ste.h"

// Always inline, as in math/macros.h, but of the host alone.
#define CG_DISPATCH     \
  template <class Body> \
  inline __attribute__((always_inline)) void

namespace cg {

template <class T>
struct Tag {
  using type = T;
};
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

CG_DISPATCH with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(Tag<float>{});
    case Dtype::float64: return body(Tag<double>{});
    case Dtype::bfloat16: return body(Tag<bf16>{});
    case Dtype::float16: return body(Tag<f16>{});
  }
}

CG_DISPATCH with_rounding(Rounding rounding, const Body& body) {
  switch (rounding) {
    case Rounding::ceil: return body(Constant<Rounding::ceil>{});
    case Rounding::nearest: return body(Constant<Rounding::nearest>{});
    case Rounding::hwgq: return body(Constant<Rounding::hwgq>{});
  }
}

CG_DISPATCH with_ste(Ste ste, const Body& body) {
  switch (ste) {
#define CG_CASE(name, Struct) \
  case Ste::name: return body(Tag<Struct>{});
    CG_FOR_EACH_STE(CG_CASE)
#undef CG_CASE
  }
}

// A width of packed codes.
CG_DISPATCH with_width(int width, const Body& body) {
  switch (width) {
    case 1: return body(Constant<1>{});
    case 2: return body(Constant<2>{});
    case 4: return body(Constant<4>{});
    default: return body(Constant<8>{});
  }
}

CG_DISPATCH with_flag(bool flag, const Body& body) {
  if (flag) body(Constant<true>{});
  else body(Constant<false>{});
}

}  // namespace cg
