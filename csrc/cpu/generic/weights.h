// The scale of quantized weights, a row at a time: integers, in loops so simple that compilers vectorise them.
#pragma once

#include "../../math/weights.h"
#include "signed.h"

namespace cg::CG_ISA {
namespace {

// So many products of a short magnitude and a code of 7 bits fit into 32 bits.
constexpr int64_t kRun = 512;

// Magnitudes of a row, filled up with zeros to whole blocks.
template <class T>
void read_magnitudes(const T* row, int64_t length, int shift, int32_t* m) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const PowerOfTwo<A> power(shift);
  for (int64_t block = 0; block * kBlock < length; ++block) {
    T copy[kBlock];
    A v[kBlock];
    const T* const from = read_block(row, block, block_count(length, block), copy);
    for (int i = 0; i < kBlock; i += Lanes<V>::kCount) Io<A>::store(v + i, Io<T>::load(from + i));
    for (int i = 0; i < kBlock; ++i) m[block * kBlock + i] = magnitude(v[i], power);
  }
}

int64_t sum_of(const int32_t* m, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += m[i];
  return sum;
}

// ---- two bits

// (sum, count) of the magnitudes from `least` on.
Quotient from_on(const int32_t* m, int64_t count, int32_t least) {
  Quotient found{0, 0};
  for (int64_t run = 0; run < count; run += kRun) {
    const int64_t end = run + kRun < count ? run + kRun : count;
    int64_t sum = 0;
    int32_t number = 0;
    for (int64_t i = run; i < end; ++i) {
      sum += m[i] >= least ? m[i] : 0;
      number += m[i] >= least ? 1 : 0;
    }
    found.product += sum, found.square += number;
  }
  return found;
}

// Moves the number at `i` down to where no number below it is larger.
CG_HD void sift(int32_t* heap, int64_t count, int64_t i) {
  const int32_t v = heap[i];
  for (int64_t child; (child = 2 * i + 1) < count; i = child) {
    if (child + 1 < count && heap[child + 1] > heap[child]) ++child;
    if (heap[child] <= v) break;
    heap[i] = heap[child];
  }
  heap[i] = v;
}

// A set of the largest magnitudes is *fixed* if it has those from its half mean on, as the best has. From any set the
// half mean leads to another; from the smallest one on to larger ones, from the largest one on to smaller ones, and
// every fixed set lies between. What is then left between them is sorted.
Quotient ternary(const int32_t* m, int64_t count, int32_t largest, int32_t* rest) {
  int32_t high_from = largest, low_from = 1;
  Quotient high = from_on(m, count, high_from), low = from_on(m, count, low_from);
  constexpr int kPasses = 16;
  for (int pass = 0; pass < kPasses && low.square - high.square > count / 64; ++pass) {
    high_from = half_mean(high), low_from = half_mean(low);
    high = from_on(m, count, high_from), low = from_on(m, count, low_from);
  }
  if (high.square == low.square) return high;
  int64_t left = 0;
  for (int64_t i = 0; i < count; ++i) {
    rest[left] = m[i];
    left += m[i] >= low_from && m[i] < high_from ? 1 : 0;
  }
  for (int64_t i = left / 2; i-- > 0;) sift(rest, left, i);
  Quotient set = high, best = high;
  double explained = -1;
  // Of `high` all, and below `low` none are from the half mean on.
  for (int32_t least = largest;;) {
    const int32_t next = left > 0 ? rest[0] : 0;
    if (2 * set.square * least >= set.product && 2 * set.square * next < set.product && set.explained() > explained) {
      best = set, explained = set.explained();
    }
    if (left == 0) return best;
    least = next;
    set.product += least, ++set.square;
    rest[0] = rest[--left];
    sift(rest, left, 0);
  }
}

// ---- four and eight bits

template <int kTop, int kShift>
Quotient search_sums(const int16_t* m, int64_t count, int32_t inverse) {
  Quotient found{0, 0};
  for (int64_t run = 0; run < count; run += kRun) {
    int32_t sums[2];
    search_codes<kTop, kShift>(m + run, static_cast<int>(run + kRun < count ? kRun : count - run), inverse, sums);
    found.product += sums[0], found.square += sums[1];
  }
  return found;
}

template <int kBits>
Quotient gridded(const int32_t* m, int64_t count, int32_t largest, int16_t* shorts) {
  constexpr WeightGrid kGrid = weight_grid(kBits);
  for (int64_t i = 0; i < count; ++i) shorts[i] = static_cast<int16_t>(short_magnitude(m[i]));
  double explained = -1;
  int32_t chosen = 0;
  for (int i = 0; i < kGrid.count; ++i) {
    const int32_t inverse = search_inverse(kGrid, kGrid.divisors[i], largest);
    const double of_this = search_sums<kGrid.top, kGrid.shift - 15>(shorts, count, inverse).explained();
    if (of_this > explained) explained = of_this, chosen = inverse;
  }
  Quotient found{0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t k = search_code(short_magnitude(m[i]), chosen, kGrid);
    found.product += static_cast<int64_t>(m[i]) * k, found.square += k * k;
  }
  return found;
}

template <class T>
void weight_scales_of(const WeightScale& a, int64_t begin, int64_t end, int32_t* m, void* more) {
  using A = compute_t<T>;
  const int64_t padded = (a.length + kBlock - 1) / kBlock * kBlock;
  for (int64_t row = begin; row < end; ++row) {
    const T* const x = static_cast<const T*>(a.weight) + row * a.length;
    const A largest = wide(largest_magnitude(x, a.length));
    A& scale = static_cast<A*>(a.scale)[row];
    if (!(largest > A(0)) || !(largest - largest == A(0))) {
      scale = largest - largest;  // 0, or NaN of an infinity or NaN
      continue;
    }
    const int shift = magnitude_shift(largest);
    const int32_t top = magnitude(largest, PowerOfTwo<A>(shift));
    read_magnitudes(x, a.length, shift, m);
    const Quotient q = a.bits == 1   ? Quotient{sum_of(m, padded), a.length}
                       : a.bits == 2 ? ternary(m, padded, top, static_cast<int32_t*>(more))
                       : a.bits == 4 ? gridded<4>(m, padded, top, static_cast<int16_t*>(more))
                                     : gridded<8>(m, padded, top, static_cast<int16_t*>(more));
    scale = weight_scale<A>(q, shift);
  }
}

void weight_scales(const WeightScale& a, int64_t begin, int64_t end, int32_t* magnitudes, void* more) {
  with_dtype(a.dtype,
             [&](auto dtype) { weight_scales_of<typename decltype(dtype)::type>(a, begin, end, magnitudes, more); });
}

}  // namespace
}  // namespace cg::CG_ISA
