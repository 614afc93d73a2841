// Two packs as one: what is done to a Two is done to both in turn, so that where a formula is a chain of operations that
// wait for each other, two chains (or four: a Two of Twos) fill each other's gaps.
#pragma once

#include "../math/ste.h"

namespace cg::CG_ISA {

// What is overloaded below would hide these.
using cg::is_positive;
using cg::max_of;
using cg::min_of;
using cg::mul;
using cg::mul_add;
using cg::one_over_16;
using cg::select;
using cg::shift_bits_left;
using cg::times_pow2;

template <class P>
struct Two {
  using scalar = scalar_of<P>;
  P first, second;
  CG_HD Two() = default;
  CG_HD Two(P a, P b) : first(a), second(b) {}
  template <class S>
  explicit CG_HD Two(S both) : first(both), second(both) {}
};
template <class M>
struct TwoMasks {
  M first, second;
};
template <class M>
TwoMasks(M, M) -> TwoMasks<M>;

template <class P>
CG_HD Two<P> operator+(Two<P> a, Two<P> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class P>
CG_HD Two<P> operator-(Two<P> a, Two<P> b) {
  return {a.first - b.first, a.second - b.second};
}
template <class P>
CG_HD Two<P> operator/(Two<P> a, Two<P> b) {
  return {a.first / b.first, a.second / b.second};
}
template <class P>
CG_HD auto operator<(Two<P> a, Two<P> b) {
  return TwoMasks{a.first < b.first, a.second < b.second};
}
template <class P>
CG_HD auto operator<=(Two<P> a, Two<P> b) {
  return TwoMasks{a.first <= b.first, a.second <= b.second};
}
template <class P>
CG_HD auto operator>(Two<P> a, Two<P> b) {
  return TwoMasks{a.first > b.first, a.second > b.second};
}
template <class P>
CG_HD auto operator!=(Two<P> a, Two<P> b) {
  return TwoMasks{a.first != b.first, a.second != b.second};
}
template <class M>
CG_HD TwoMasks<M> operator&(TwoMasks<M> a, TwoMasks<M> b) {
  return {a.first & b.first, a.second & b.second};
}
template <class M>
CG_HD TwoMasks<M> operator|(TwoMasks<M> a, TwoMasks<M> b) {
  return {a.first | b.first, a.second | b.second};
}
template <class M>
CG_HD TwoMasks<M> operator!(TwoMasks<M> a) {
  return {!a.first, !a.second};
}
template <class P>
CG_HD auto is_positive(Two<P> a) {
  return TwoMasks{is_positive(a.first), is_positive(a.second)};
}
template <class P>
CG_HD Two<P> mul(Two<P> a, Two<P> b) {
  return {mul(a.first, b.first), mul(a.second, b.second)};
}
template <class M, class P>
CG_HD Two<P> select(TwoMasks<M> m, Two<P> a, Two<P> b) {
  return {select(m.first, a.first, b.first), select(m.second, a.second, b.second)};
}
template <class P>
CG_HD Two<P> min_of(Two<P> a, Two<P> b) {
  return {min_of(a.first, b.first), min_of(a.second, b.second)};
}
template <class P>
CG_HD Two<P> max_of(Two<P> a, Two<P> b) {
  return {max_of(a.first, b.first), max_of(a.second, b.second)};
}
template <class P>
CG_HD Two<P> floor(Two<P> a) {
  return {floor(a.first), floor(a.second)};
}
template <class P>
CG_HD Two<P> shift_bits_left(Two<P> a, int count) {
  return {shift_bits_left(a.first, count), shift_bits_left(a.second, count)};
}
template <class P>
CG_HD Two<P> times_pow2(Two<P> a, Two<P> shifted) {
  return {times_pow2(a.first, shifted.first), times_pow2(a.second, shifted.second)};
}
template <class P>
CG_HD Two<P> mul_add(Two<P> a, Two<P> b, Two<P> c) {
  return {mul_add(a.first, b.first, c.first), mul_add(a.second, b.second, c.second)};
}
template <class P>
CG_HD Two<P> one_over_16(Two<P> d) {
  return {one_over_16(d.first), one_over_16(d.second)};
}

}  // namespace cg::CG_ISA
