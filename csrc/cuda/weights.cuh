// The scale of quantized weights: exact sums of integers over the parts of each row, which atomic additions complete in
// any order.
#pragma once

#include "../math/weights.h"
#include "signed.cuh"

namespace cg::cuda {

// What is found of each row. Sums and largest bits start as zeros.
struct WeightSums {
  unsigned long long* largest;  // [rows]: the bits of the largest |w|
  Quotient* tried;  // [rows, tried_count]: of each scale of a grid; of two bits the best of each part
  int64_t tried_count;
  Quotient* found;  // [rows]: P and N; not of two bits
  int32_t* magnitudes;  // of two bits, [rows, length]: to be sorted, the largest first
  const int64_t* totals;  // their sums
};

// The weights of a row that a block has, those of sorted magnitudes that a warp has, and the scales tried at once.
constexpr int64_t kPart = 1 << 14, kSortedPart = 1 << 11;
constexpr int kTried = 8, kWarps = kThreads / kWarp;
// So few products of a short magnitude and a code of 7 bits fit into 32 bits.
static_assert(kPart / kThreads <= 512);

// A row's exponent, if it has weights other than 0 and no infinity or NaN.
template <class T>
struct WeightRow {
  using A = compute_t<T>;
  A largest;
  CG_D explicit WeightRow(unsigned long long bits) : largest(number_of<T>(static_cast<magnitude_t<T>>(bits))) {}
  CG_D bool regular() const { return largest > A(0) && largest < A(INFINITY); }
  CG_D int shift() const { return magnitude_shift(largest); }
};

// Calls each(i, w) for the weights of the part `part` of the block's row that are the thread's.
template <class T, class Each>
CG_D void for_each_weight(const WeightScale& a, int64_t part, const Each& each) {
  const int64_t begin = part * kPart, end = begin + kPart < a.length ? begin + kPart : a.length;
  const T* const row = static_cast<const T*>(a.weight) + blockIdx.x * a.length;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) each(i, row[i]);
}
// Calls each(i, m) with their magnitudes.
template <class T, class Each>
CG_D void for_each_magnitude(const WeightScale& a, int64_t part, const WeightRow<T>& row, const Each& each) {
  const PowerOfTwo<compute_t<T>> power(row.shift());
  for_each_weight<T>(a, part, [&](int64_t i, T w) { each(i, cg::magnitude(widen(w), power)); });
}

CG_D void add_to(int64_t& sum, int64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(v));
}
// Adds a warp's sums, of all of its lanes.
CG_D void add_to(Quotient& sums, int64_t product, int64_t square) {
  product = warp_sum(product), square = warp_sum(square);
  if (threadIdx.x % kWarp == 0) add_to(sums.product, product), add_to(sums.square, square);
}

// The first of those that explain the most.
CG_D int64_t best_of(const Quotient* quotients, int64_t count) {
  double most = -1;
  int64_t best = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (quotients[i].square == 0) continue;
    const double explained = quotients[i].explained();
    if (explained > most) most = explained, best = i;
  }
  return best;
}

template <class T>
__global__ void __launch_bounds__(kThreads) weight_largest_kernel(const WeightScale a, const WeightSums s) {
  magnitude_t<T> largest = 0;
  for_each_weight<T>(a, blockIdx.y, [&](int64_t, T w) { largest = larger(largest, magnitude_t<T>(magnitude(w))); });
  largest = largest_of_warp(largest);
  if (threadIdx.x % kWarp == 0) atomicMax(&s.largest[blockIdx.x], static_cast<unsigned long long>(largest));
}

// blockIdx.y: part * (groups of scales) + group.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_search_kernel(const WeightScale a, const WeightSums s, const WeightGrid grid) {
  const WeightRow<T> row(s.largest[blockIdx.x]);
  if (!row.regular()) return;
  const int groups = (grid.count + kTried - 1) / kTried, first = static_cast<int>(blockIdx.y) % groups * kTried;
  const int32_t top = cg::magnitude(row.largest, PowerOfTwo<compute_t<T>>(row.shift()));
  int32_t inverses[kTried], products[kTried] = {}, squares[kTried] = {};
#pragma unroll
  for (int t = 0; t < kTried; ++t) {
    inverses[t] = first + t < grid.count ? search_inverse(grid, grid.divisors[first + t], top) : 0;
  }
  for_each_magnitude(a, blockIdx.y / groups, row, [&](int64_t, int32_t m) {
    const int32_t short_m = short_magnitude(m);
#pragma unroll
    for (int t = 0; t < kTried; ++t) {
      const int32_t k = search_code(short_m, inverses[t], grid);
      products[t] += short_m * k;
      squares[t] += k * k;
    }
  });
  Quotient* const tried = s.tried + blockIdx.x * s.tried_count + first;
#pragma unroll
  for (int t = 0; t < kTried; ++t) {
    if (first + t < grid.count) add_to(tried[t], products[t], squares[t]);
  }
}

// P and N; one bit has no grid.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weight_sums_kernel(const WeightScale a, const WeightSums s, const WeightGrid grid) {
  const WeightRow<T> row(s.largest[blockIdx.x]);
  if (!row.regular()) return;
  int64_t product = 0, square = 0;
  if (a.bits == 1) {
    for_each_magnitude(a, blockIdx.y, row, [&](int64_t, int32_t m) { product += m, ++square; });
  } else {
    const int32_t top = cg::magnitude(row.largest, PowerOfTwo<compute_t<T>>(row.shift()));
    const int64_t best = best_of(s.tried + blockIdx.x * s.tried_count, s.tried_count);
    const int32_t inverse = search_inverse(grid, grid.divisors[best], top);
    for_each_magnitude(a, blockIdx.y, row, [&](int64_t, int32_t m) {
      const int32_t k = search_code(short_magnitude(m), inverse, grid);
      product += int64_t{m} * k, square += k * k;
    });
  }
  add_to(s.found[blockIdx.x], product, square);
}

template <class T>
__global__ void __launch_bounds__(kThreads) weight_magnitudes_kernel(const WeightScale a, const WeightSums s) {
  const WeightRow<T> row(s.largest[blockIdx.x]);
  int32_t* const to = s.magnitudes + blockIdx.x * a.length;
  if (!row.regular()) {
    for_each_weight<T>(a, blockIdx.y, [&](int64_t i, T) { to[i] = 0; });
  } else {
    for_each_magnitude(a, blockIdx.y, row, [&](int64_t i, int32_t m) { to[i] = m; });
  }
}

// The best of the sets of the largest magnitudes that have those from their half mean on, and no others, of each part
// of sorted ones; of equals the smallest. A warp has a part.
__global__ void __launch_bounds__(kThreads) weight_ternary_kernel(const WeightScale a, const WeightSums s) {
  const int64_t part = int64_t{blockIdx.y} * kWarps + threadIdx.x / kWarp, begin = part * kSortedPart;
  const int64_t end = begin + kSortedPart < a.length ? begin + kSortedPart : a.length;
  const int32_t* const m = s.magnitudes + blockIdx.x * a.length;
  const int64_t* const totals = s.totals + blockIdx.x * a.length;
  double most = -1;
  Quotient best{0, 0};
  for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kWarp) {
    const Quotient set{totals[i], i + 1};
    const int64_t following = i + 1 < a.length ? m[i + 1] : 0;
    if (2 * set.square * m[i] < set.product || 2 * set.square * following >= set.product) continue;
    const double explained = set.explained();
    if (explained > most) most = explained, best = set;
  }
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const double other_most = __shfl_xor_sync(0xffffffffu, most, apart);
    const Quotient other{__shfl_xor_sync(0xffffffffu, best.product, apart),
                         __shfl_xor_sync(0xffffffffu, best.square, apart)};
    if (other_most > most || (other_most == most && other.square < best.square)) most = other_most, best = other;
  }
  if (threadIdx.x % kWarp == 0 && part < s.tried_count) s.tried[blockIdx.x * s.tried_count + part] = best;
}

// A thread has a row.
template <class T>
__global__ void __launch_bounds__(kThreads) weight_scale_kernel(const WeightScale a, const WeightSums s) {
  using A = compute_t<T>;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= a.rows) return;
  const WeightRow<T> row(s.largest[at]);
  A& scale = static_cast<A*>(a.scale)[at];
  if (!row.regular()) {
    scale = row.largest - row.largest;  // 0, or NaN of an infinity or NaN
    return;
  }
  const Quotient* const tried = s.tried + at * s.tried_count;
  scale = weight_scale<A>(a.bits == 2 ? tried[best_of(tried, s.tried_count)] : s.found[at], row.shift());
}

}  // namespace cg::cuda
