// Two vectors as one. An operation on a Pair is done to both in turn: where a formula is a chain of dependent
// operations, two chains (or four: a Pair of Pairs) hide each other's latency.
#pragma once

#include "fast_slope.h"

namespace cg {

template <class V>
struct Pair {
  V first, second;
  CG_HD Pair() = default;
  CG_HD Pair(V a, V b) : first(a), second(b) {}
  template <class S>
  explicit CG_HD Pair(S both) : first(both), second(both) {}
};

template <class V>
struct ScalarOf<Pair<V>> {
  using type = scalar_of<V>;
};

// Defines `name` for pairs as `expression` of the first elements a, b, c, and of the second ones.
#define CG_ELEMENTWISE_1(name, expression)                                           \
  template <class A>                                                                 \
  CG_HD auto name(Pair<A> p) {                                                       \
    const auto each = [](A a) __attribute__((always_inline)) { return expression; }; \
    return Pair{each(p.first), each(p.second)};                                      \
  }
#define CG_ELEMENTWISE_2(name, expression)                                                \
  template <class A>                                                                      \
  CG_HD auto name(Pair<A> p, Pair<A> q) {                                                 \
    const auto each = [](A a, A b) __attribute__((always_inline)) { return expression; }; \
    return Pair{each(p.first, q.first), each(p.second, q.second)};                        \
  }
#define CG_ELEMENTWISE_3(name, expression)                                                     \
  template <class A, class B>                                                                  \
  CG_HD auto name(Pair<A> p, Pair<B> q, Pair<B> r) {                                           \
    const auto each = [](A a, B b, B c) __attribute__((always_inline)) { return expression; }; \
    return Pair{each(p.first, q.first, r.first), each(p.second, q.second, r.second)};          \
  }

// clang-format off
CG_ELEMENTWISE_2(operator+, a + b)
CG_ELEMENTWISE_2(operator-, a - b)
CG_ELEMENTWISE_2(operator/, a / b)
CG_ELEMENTWISE_2(operator<, a < b)
CG_ELEMENTWISE_2(operator<=, a <= b)
CG_ELEMENTWISE_2(operator>, a > b)
CG_ELEMENTWISE_2(operator!=, a != b)
CG_ELEMENTWISE_2(operator&, a & b)
CG_ELEMENTWISE_2(operator|, a | b)
CG_ELEMENTWISE_1(operator!, !a)
CG_ELEMENTWISE_2(mul, mul(a, b))
CG_ELEMENTWISE_2(min_of, min_of(a, b))
CG_ELEMENTWISE_2(max_of, max_of(a, b))
CG_ELEMENTWISE_3(select, select(a, b, c))
CG_ELEMENTWISE_1(ceil, ceil(a))
CG_ELEMENTWISE_1(floor, floor(a))
CG_ELEMENTWISE_1(is_positive, is_positive(a))
CG_ELEMENTWISE_2(times_pow2, times_pow2(a, b))
CG_ELEMENTWISE_3(mul_add, mul_add(a, b, c))
CG_ELEMENTWISE_1(approximate_reciprocal, approximate_reciprocal(a))
// clang-format on

#undef CG_ELEMENTWISE_1
#undef CG_ELEMENTWISE_2
#undef CG_ELEMENTWISE_3

template <class V>
CG_HD Pair<V> shift_bits_left(Pair<V> a, int count) {
  return {shift_bits_left(a.first, count), shift_bits_left(a.second, count)};
}

}  // namespace cg
