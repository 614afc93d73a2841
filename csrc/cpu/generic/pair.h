// Pair vectors as one: what is done to a Pair is done to both in turn, so that where a formula is a chain of operations that
// wait for each other, two chains (or four: a Pair of Twos) fill each other's gaps.
#pragma once

#include "../../math/ste.h"

namespace cg::CG_ISA {

// What is overloaded below would hide these.
using cg::is_positive;
using cg::max_of;
using cg::min_of;
using cg::mul;
using cg::mul_add;
using cg::approximate_reciprocal;
using cg::select;
using cg::shift_bits_left;
using cg::times_pow2;

template <class V>
struct Pair {
  using scalar = scalar_of<V>;
  V first, second;
  CG_HD Pair() = default;
  CG_HD Pair(V a, V b) : first(a), second(b) {}
  template <class S>
  explicit CG_HD Pair(S both) : first(both), second(both) {}
};
template <class M>
struct PairMask {
  M first, second;
};
template <class M>
PairMask(M, M) -> PairMask<M>;

template <class V>
CG_HD Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class V>
CG_HD Pair<V> operator-(Pair<V> a, Pair<V> b) {
  return {a.first - b.first, a.second - b.second};
}
template <class V>
CG_HD Pair<V> operator/(Pair<V> a, Pair<V> b) {
  return {a.first / b.first, a.second / b.second};
}
template <class V>
CG_HD auto operator<(Pair<V> a, Pair<V> b) {
  return PairMask{a.first < b.first, a.second < b.second};
}
template <class V>
CG_HD auto operator<=(Pair<V> a, Pair<V> b) {
  return PairMask{a.first <= b.first, a.second <= b.second};
}
template <class V>
CG_HD auto operator>(Pair<V> a, Pair<V> b) {
  return PairMask{a.first > b.first, a.second > b.second};
}
template <class V>
CG_HD auto operator!=(Pair<V> a, Pair<V> b) {
  return PairMask{a.first != b.first, a.second != b.second};
}
template <class M>
CG_HD PairMask<M> operator&(PairMask<M> a, PairMask<M> b) {
  return {a.first & b.first, a.second & b.second};
}
template <class M>
CG_HD PairMask<M> operator|(PairMask<M> a, PairMask<M> b) {
  return {a.first | b.first, a.second | b.second};
}
template <class M>
CG_HD PairMask<M> operator!(PairMask<M> a) {
  return {!a.first, !a.second};
}
template <class V>
CG_HD auto is_positive(Pair<V> a) {
  return PairMask{is_positive(a.first), is_positive(a.second)};
}
template <class V>
CG_HD Pair<V> mul(Pair<V> a, Pair<V> b) {
  return {mul(a.first, b.first), mul(a.second, b.second)};
}
template <class M, class V>
CG_HD Pair<V> select(PairMask<M> m, Pair<V> a, Pair<V> b) {
  return {select(m.first, a.first, b.first), select(m.second, a.second, b.second)};
}
template <class V>
CG_HD Pair<V> min_of(Pair<V> a, Pair<V> b) {
  return {min_of(a.first, b.first), min_of(a.second, b.second)};
}
template <class V>
CG_HD Pair<V> max_of(Pair<V> a, Pair<V> b) {
  return {max_of(a.first, b.first), max_of(a.second, b.second)};
}
template <class V>
CG_HD Pair<V> floor(Pair<V> a) {
  return {floor(a.first), floor(a.second)};
}
template <class V>
CG_HD Pair<V> shift_bits_left(Pair<V> a, int count) {
  return {shift_bits_left(a.first, count), shift_bits_left(a.second, count)};
}
template <class V>
CG_HD Pair<V> times_pow2(Pair<V> a, Pair<V> shifted) {
  return {times_pow2(a.first, shifted.first), times_pow2(a.second, shifted.second)};
}
template <class V>
CG_HD Pair<V> mul_add(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {mul_add(a.first, b.first, c.first), mul_add(a.second, b.second, c.second)};
}
template <class V>
CG_HD Pair<V> approximate_reciprocal(Pair<V> d) {
  return {approximate_reciprocal(d.first), approximate_reciprocal(d.second)};
}

}  // namespace cg::CG_ISA
