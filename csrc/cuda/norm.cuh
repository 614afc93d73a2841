// RMSNorm and LayerNorm of rows, and the signed staircase of their output in the same pass.
#pragma once

#include "../math/norm.h"
#include "hadamard.cuh"
#include "signed.cuh"

namespace cg::cuda {

// A norm and what follows it.
struct NormStaircase {
  Norm norm;                // weight may be null, and out if it is not wanted
  bool wide_parameters;     // weight and bias are of the compute type, else of x's dtype
  bool shifted;             // by 1 + weight
  Hadamard rotation;        // of size 0 if there is none
  SignedForward staircase;  // with a count of 0 if there is none
};

// The lanes of a row's sums that a thread has. Threads that share a row, a power of two of them, have consecutive units
// of kUnit elements each, and then the same of what follows: lanes[step * kUnit + i] of a thread is lane
// (step * threads + thread) * kUnit + i.
constexpr int kOwnLanes = kNormLanes / kThreads;
static_assert(kOwnLanes * kThreads == kNormLanes);
// As many threads can give half of a chunk's lanes away, again and again, until each has one.
constexpr int kLeastRowThreads = kOwnLanes;

// The sum over kCount lanes of each of 2 * apart neighbours in a warp, for all of them. The upper half is added to the
// lower one until one is left, half of the sums by either of two neighbours.
template <class A, int kCount>
CG_D A sum_of_lanes(const A (&v)[kCount], int apart) {
  if constexpr (kCount == 1) {
    A sum = v[0];
    for (; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    return sum;
  } else {
    // The last bit of a lane's place goes first, as it is the last that is added over.
    const bool odd = (threadIdx.x & apart) != 0;
    A half[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const A own = odd ? v[2 * i + 1] : v[2 * i], other = odd ? v[2 * i] : v[2 * i + 1];
      half[i] = own + __shfl_xor_sync(0xffffffffu, other, apart);
    }
    const A sum = sum_of_lanes(half, apart / 2);
    return sum + __shfl_xor_sync(0xffffffffu, sum, apart);
  }
}

// The sum over the lanes of a row, for the threads that share it.
template <int kUnit, class A>
CG_D A row_sum(A (&lanes)[kOwnLanes], int threads) {
#pragma unroll
  for (int half = kOwnLanes / 2; half >= kUnit; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  A own[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) own[i] = lanes[i];
  if (threads > kWarp) {  // of two warps, or of four; a block has a row
    CG_SHARED(A, all, kUnit * kThreads);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) all[i * kThreads + threadIdx.x] = own[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const A* const from = all + i * kThreads + threadIdx.x % kWarp;
      const A sum = from[0] + from[threads / 2];
      own[i] = threads == 2 * kWarp ? sum : sum + (from[kWarp] + from[3 * kWarp]);
    }
    __syncthreads();  // before the next call writes
  }
  return sum_of_lanes(own, (threads < kWarp ? threads : kWarp) / 2);
}

template <class T, int kUnit>
CG_D void load_parameters(const void* from, bool wide, int64_t unit, compute_t<T> (&v)[kUnit]) {
  if constexpr (kUnit == 1) {
    v[0] = wide ? static_cast<const compute_t<T>*>(from)[unit] : widen(static_cast<const T*>(from)[unit]);
  } else if (sizeof(T) == 2 && !wide) {
    widen_chunk<T>(load_chunk<T>(from, unit), v);
  } else {
    constexpr int kFour = kChunk<float>;
#pragma unroll
    for (int j = 0; j < kUnit / kFour; ++j) {
      float four[kFour];
      widen_chunk<float>(load_chunk<float>(from, unit * (kUnit / kFour) + j), four);
#pragma unroll
      for (int i = 0; i < kFour; ++i) v[j * kFour + i] = four[i];
    }
  }
}

// From a unit of the row less its mean to the norm's output, yet to be rounded to T.
template <class T, int kUnit>
CG_D void finish_unit(const NormStaircase& a, int64_t unit, compute_t<T> inverse, compute_t<T> (&n)[kUnit]) {
  using A = compute_t<T>;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) n[i] = mul(n[i], inverse);
  if (a.norm.rounds_twice) {
    if constexpr (kUnit == 1) n[0] = round_to<T>(n[0]);
    else round_levels<T>(n);
  }
  A parameter[kUnit];
  if (a.norm.weight) {
    load_parameters<T>(a.norm.weight, a.wide_parameters, unit, parameter);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) n[i] = mul(n[i], a.shifted ? parameter[i] + A(1) : parameter[i]);
  }
  if (a.norm.bias) {
    load_parameters<T>(a.norm.bias, a.wide_parameters, unit, parameter);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) n[i] += parameter[i];
  }
}

// A row, as a thread of those that share it sees it. kHeld: it has no more elements than lanes, and is read once; else
// again from a cache. Units are chunks or single elements.
template <class T, int kUnit, bool kHeld>
struct NormRow {
  using A = compute_t<T>;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  static constexpr bool kIsHeld = kHeld;
  static constexpr int kSteps = kOwnLanes / kUnit;  // of a pass over the lanes
  const T* x;
  int64_t at, first_unit;  // of all rows
  Index units;             // none if there is no such row
  int threads, thread;
  A mean, held[kOwnLanes];

  CG_D NormRow(const Norm& a, int64_t row, int shift)
      : at(row), threads(1 << shift), thread(threadIdx.x & (threads - 1)), mean(0) {
    const int64_t of_each = a.length / kUnit;
    x = static_cast<const T*>(a.x) + row * a.length;
    first_unit = row * of_each;
    units = static_cast<Index>(row < a.rows ? of_each : 0);
    if constexpr (kHeld) load(0, held);
  }
  // Whether the thread stores what there is one of for a row.
  CG_D bool leads(const Norm& a) const { return at < a.rows && thread == 0; }

  CG_D Index unit(Index first, int step) const { return first + step * threads + thread; }
  // The thread's elements of the units from `first` on, less the mean; 0 past the end.
  CG_D void load(Index first, A (&v)[kOwnLanes]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      A own[kUnit] = {};
      if (const Index i = unit(first, step); i < units) {
        if constexpr (kUnit == 1) own[0] = widen(x[i]);
        else widen_chunk<T>(load_chunk<T>(x, i), own);
#pragma unroll
        for (int k = 0; k < kUnit; ++k) own[k] -= mean;
      }
#pragma unroll
      for (int k = 0; k < kUnit; ++k) v[step * kUnit + k] = own[k];
    }
  }
  // Calls body(first, v) for each pass, kAhead of them with all loads first.
  template <int kAhead, class Body>
  CG_D void for_each_pass(const Body& body) const {
    if constexpr (kHeld) {
      body(0, held);
    } else {
      const int apart = kSteps * threads;
      for (Index first = 0; first < units; first += kAhead * apart) {
        A v[kAhead][kOwnLanes];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) load(first + u * apart, v[u]);
#pragma unroll
        for (int u = 0; u < kAhead; ++u) body(first + u * apart, v[u]);
      }
    }
  }
  template <class Term>
  CG_D A sum(const Term& term) const {
    A lanes[kOwnLanes] = {};
    for_each_pass<(kSteps < kUnroll ? kUnroll / kSteps : 1)>([&](Index, const A(&v)[kOwnLanes]) {
#pragma unroll
      for (int i = 0; i < kOwnLanes; ++i) lanes[i] += term(v[i]);
    });
    return row_sum<kUnit>(lanes, threads);
  }
  // From here on elements are less this.
  CG_D void set_mean(A found) {
    mean = found;
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < kOwnLanes; ++i) held[i] = unit(0, i / kUnit) < units ? held[i] - mean : A(0);
    }
  }
};

// Elements one by one.
template <class T, class Row>
CG_D void store_norm(const NormStaircase& a, const Row& row, compute_t<T> inverse) {
  T* const out = static_cast<T*>(a.norm.out) + row.first_unit;
  row.template for_each_pass<1>([&](auto first, const compute_t<T>(&v)[kOwnLanes]) {
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const auto unit = row.unit(first, step);
      if (unit >= row.units) continue;
      compute_t<T> n[] = {v[step]};
      finish_unit<T>(a, unit, inverse, n);
      out[unit] = narrow<T>(n[0]);
    }
  });
}

// A unit of the norm's output, stored if it is wanted; zeros past the end.
template <class T, class Row>
CG_D Chunk finish_chunk(const NormStaircase& a, const Row& row, int64_t unit, compute_t<T> inverse, const float* v) {
  if (unit >= row.units) return {};
  float n[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) n[i] = v[i];
  finish_unit<T>(a, unit, inverse, n);
  const Chunk words = round_chunk<T>(n);
  if (a.norm.out) store_chunk<T>(a.norm.out, row.first_unit + unit, words);
  return words;
}

template <class T>
CG_D Chunk rotated(const Chunk& words, const Hadamard& a) {
  float v[1][kChunk<T>];
  widen_chunk<T>(words, v[0]);
  rotate_chunks<T>(v, static_cast<int>(a.size), static_cast<float>(a.scale));
  return round_chunk<T>(v[0]);
}

// A chunk, which is not in memory yet, of a group with this alpha.
template <class T>
CG_D void norm_group_chunk(const SignedForward& a, int64_t chunk, const Chunk& words, bf16 stored, float p) {
  const Alpha<T> alpha(alpha_in_use(stored), Rounding::nearest);
  if (!alpha.is_regular(p)) store_chunk<T>(a.y, chunk, words);  // it is read again: a.x is a.y
  signed_group_chunk<T>(a, chunk, words, alpha, p);
}

// Chunks, and their staircases if there are some. A group has 2^group_shift chunks, or is the row; what is not held
// then waits in y for its alpha.
template <class T, class Row>
CG_D void store_norm_staircase(const NormStaircase& a, const Row& row, compute_t<T> inverse, int group_shift) {
  const SignedForward& staircase = a.staircase;
  const bool quantizes = staircase.count > 0, by_row = staircase.group == a.norm.length;
  const float p = quantizes ? static_cast<float>(signed_top(staircase.bits)) : 0;
  Chunk kept[Row::kSteps];
  uint32_t largest[] = {0};
  row.template for_each_pass<1>([&](auto first, const float (&v)[kOwnLanes]) {
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const auto unit = row.unit(first, step);
      const int64_t chunk = row.first_unit + unit;
      Chunk words = finish_chunk<T>(a, row, unit, inverse, v + step * kChunk<T>);
      if (!quantizes) continue;
      if (a.rotation.size > 0) words = rotated<T>(words, a.rotation);
      uint32_t of_group[] = {largest_of<T>(words)};
      if (by_row) {
        largest[0] = larger(largest[0], of_group[0]);
        if constexpr (Row::kIsHeld) kept[step] = words;
        else if (unit < row.units) store_chunk<T>(staircase.y, chunk, words);
      } else {
        largest_of_lanes(of_group, 1 << group_shift);
        if (unit >= row.units) continue;
        const bf16 stored = signed_alpha(number_of<T>(of_group[0]), p);
        if ((row.thread & ((1 << group_shift) - 1)) == 0) staircase.group_alphas[chunk >> group_shift] = stored;
        norm_group_chunk<T>(staircase, chunk, words, stored, p);
      }
    }
  });
  if (!quantizes || !by_row) return;
  if (row.threads > kWarp) largest[0] = largest_of_block(largest[0]);
  else largest_of_lanes(largest, row.threads);
  const bf16 stored = signed_alpha(number_of<T>(largest[0]), p);
  if (row.leads(a.norm)) staircase.group_alphas[row.at] = stored;
  for (typename Row::Index first = 0; first < row.units; first += Row::kSteps * row.threads) {
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const auto unit = row.unit(first, step);
      const int64_t chunk = row.first_unit + unit;
      if (unit >= row.units) continue;
      if constexpr (!Row::kIsHeld) kept[step] = load_chunk<T>(staircase.y, chunk);
      norm_group_chunk<T>(staircase, chunk, kept[step], stored, p);
    }
  }
}

// 2^shift threads share a row. If a warp holds them a block has several rows, else one. Seven blocks on a
// multiprocessor leave each thread 72 registers: if left to choose, nvcc at times takes fewer and spills.
template <class T, int kUnit, bool kHeld>
__global__ void __launch_bounds__(kThreads, 7) norm_kernel(const NormStaircase a, int shift, int group_shift) {
  using A = compute_t<T>;
  const Norm& norm = a.norm;
  const int rows = static_cast<int>(blockDim.x) >> shift;
  for (int64_t base = int64_t{blockIdx.x} * rows; base < norm.rows; base += int64_t{gridDim.x} * rows) {
    NormRow<T, kUnit, kHeld> row(norm, base + (threadIdx.x >> shift), shift);
    if (norm.mean) {
      row.set_mean(row.sum([](A v) { return v; }) / A(norm.length));
      if (row.leads(norm)) static_cast<A*>(norm.mean)[row.at] = row.mean;
    }
    const A squares = row.sum([](A v) { return mul(v, v); });
    const A inverse = inverse_deviation(squares, A(norm.length), A(norm.eps));
    if (row.leads(norm)) static_cast<A*>(norm.inverse)[row.at] = inverse;
    if constexpr (kUnit == 1) store_norm<T>(a, row, inverse);
    else store_norm_staircase<T>(a, row, inverse, group_shift);
  }
}

}  // namespace cg::cuda
