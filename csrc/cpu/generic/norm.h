// RMSNorm and LayerNorm of rows, with sums in the order of docs/spec.md.
#pragma once

#include <limits>

#include "../../math/norm.h"
#include "blocks.h"

namespace cg::CG_ISA {
namespace {

// The sum over a vector, in its first number: halves are added.
template <int kHalf, class V>
CG_HD V folded(V v) {
  if constexpr (kHalf == 0) return v;
  else return folded<kHalf / 2>(v + Lanes<V>::template exchange<kHalf>(v));
}

// The lanes from kHalf on are added to the lower ones, and lanes from 2 kHalf on to those before that: the sums of the
// vector that begins at `lane`, below kHalf, in a tree of registers. leaf(i): the vector of lanes that begins at i.
template <int kHalf, class Leaf>
CG_HD auto folded_lanes(int64_t lane, int64_t used, const Leaf& leaf) {
  if constexpr (kHalf == kNormLanes) {
    return leaf(lane);
  } else {
    const auto sum = folded_lanes<2 * kHalf>(lane, used, leaf);
    return lane + kHalf < used ? sum + folded_lanes<2 * kHalf>(lane + kHalf, used, leaf) : sum;
  }
}

// The sum of term(v) over whole vectors; what fills up the last one has terms of 0. Lanes without an element are not
// added, as they are 0.
template <class A, class Term>
CG_HD A sum_of_row(const A* v, int64_t count, A* lanes, const Term& term) {
  using V = Vec<A>;
  constexpr int kCount = Lanes<V>::kCount, kInTree = 8, kRest = kNormLanes / kInTree;
  const auto fold = [&](auto used) __attribute__((always_inline)) {
    const auto leaf = [&](int64_t lane) __attribute__((always_inline)) {
      V sum = V(A(0)) + term(Io<A>::load(v + lane));
      for (int64_t i = lane + kNormLanes; i < count; i += kNormLanes) sum = sum + term(Io<A>::load(v + i));
      return sum;
    };
    for (int64_t lane = 0; lane < kRest && lane < used; lane += kCount) {
      Io<A>::store(lanes + lane, folded_lanes<kRest>(lane, used, leaf));
    }
  };
  if (count >= kNormLanes) fold(std::integral_constant<int64_t, kNormLanes>());
  else fold(count);
  if (count == 0) Io<A>::store(lanes, V(A(0)));
  int64_t used = count < kRest ? count : kRest, half = kCount;
  while (2 * half < used) half *= 2;
  for (; half >= kCount; half /= 2) {
    for (int64_t lane = 0; lane + half < used; lane += kCount) {
      Io<A>::store(lanes + lane, Io<A>::load(lanes + lane) + Io<A>::load(lanes + lane + half));
    }
    used = used < half ? used : half;
  }
  A total[kCount];
  Io<A>::store(total, folded<kCount / 2>(Io<A>::load(lanes)));
  return total[0];
}

// body(i, count) for each vector of a row; the last may have fewer numbers.
template <class V, class Body>
CG_HD void for_each_vector(int64_t length, const Body& body) {
  constexpr int kCount = Lanes<V>::kCount;
  int64_t i = 0;
  for (; i + kCount <= length; i += kCount) body(i, kCount);
  if (i < length) body(i, static_cast<int>(length - i));
}

// v: the row in the compute type, in whole vectors, and kNormLanes numbers more.
template <class T, bool kTwice, bool kBias>
CG_HD void norm_of_row(const Norm& a, int64_t row, compute_t<T>* v) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kCount = Lanes<V>::kCount;
  const int64_t length = a.length, whole = (length + kCount - 1) / kCount * kCount;
  const T* const x = static_cast<const T*>(a.x) + row * length;
  A* const lanes = v + whole;
  for_each_vector<V>(length, [&](int64_t i, int count) {
    if (count == kCount) return Io<A>::store(v + i, Io<T>::load(x + i));
    T copy[kCount] = {};
    memcpy(copy, x + i, count * sizeof(T));
    Io<A>::store(v + i, Io<T>::load(copy));
  });
  if (a.mean) {
    const A mean = sum_of_row(v, whole, lanes, [](V each) { return each; }) / A(length);
    static_cast<A*>(a.mean)[row] = mean;
    for (int64_t i = 0; i < whole; i += kCount) Io<A>::store(v + i, Io<A>::load(v + i) - V(mean));
    for (int64_t i = length; i < whole; ++i) v[i] = A(0);
  }
  const A squares = sum_of_row(v, whole, lanes, [](V each) { return mul(each, each); });
  const A inverse = inverse_deviation(squares, A(length), A(a.eps));
  static_cast<A*>(a.inverse)[row] = inverse;
  const A *const weight = static_cast<const A*>(a.weight), *const bias = static_cast<const A*>(a.bias);
  T* const out = static_cast<T*>(a.out) + row * length;
  const auto write = [&](auto numbers) __attribute__((always_inline)) {
    for_each_vector<V>(length, [&](int64_t i, int count) {
      V n = mul(Io<A>::load(v + i), V(inverse));
      if constexpr (kTwice) n = numbers.value ? round_level<T>(n) : round_to<T>(n);
      n = mul(n, Io<A>::load(weight + i));
      if constexpr (kBias) n = n + Io<A>::load(bias + i);
      n = numbers.value ? round_level<T>(n) : round_for_store<T>(n);
      if (count == kCount) return Io<T>::store(out + i, n);
      T copy[kCount];
      Io<T>::store(copy, n);
      memcpy(out + i, copy, count * sizeof(T));
    });
  };
  if constexpr (std::is_same_v<T, bf16>) {  // whose NaNs take half of the time of rounding
    // Squares with a finite sum are of finite numbers: no product of theirs is a NaN.
    if (a.finite && inverse > A(0) && inverse <= std::numeric_limits<A>::max()) return write(std::true_type());
  }
  write(std::false_type());
}

void norm(const Norm& args, int64_t begin, int64_t end, void* scratch) {
  const Norm a = args;
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    with_flag(a.rounds_twice, [&](auto twice) {
      with_flag(a.bias, [&](auto bias) {
        for (int64_t row = begin; row < end; ++row) {
          norm_of_row<T, twice.value, bias.value>(a, row, static_cast<compute_t<T>*>(scratch));
        }
      });
    });
  });
}

}  // namespace
}  // namespace cg::CG_ISA
