// The signed staircase: x to y and codes, with given and with dynamic alphas; and codes back to y.
#pragma once

#include "../math/signed.h"
#include "forward.cuh"
#include "reduce.cuh"

namespace cg::cuda {

// A chunk's k (NaN for NaN) and its outputs, yet to be rounded to T: `quantize_signed` by one fma and one comparison.
// k is floor(x / alpha) or one more, and T[k + 1] says which: a threshold is less than alpha / 2 away from
// (k - 1/2) * alpha.
template <class T, class AlphaOf, int kCount>
CG_D void quantize_signed_chunk(const float (&x)[kCount], const AlphaOf& alpha_of, float p, float (&k)[kCount],
                                float (&y)[kCount]) {
  constexpr float kMagic = kToInteger<float>;  // the sum is rounded down to an integer
  float upper[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    k[i] = bounded(__fmaf_rd(x[i], alpha_of(i).inverse, kMagic), kMagic - p, kMagic + (p - 1)) - kMagic;
    y[i] = mul(k[i], alpha_of(i).value);
    upper[i] = mul(k[i] + 1, alpha_of(i).value);
  }
  round_levels<T>(y);
  round_levels<T>(upper);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool over = x[i] > mul(y[i] + upper[i], 0.5f);
    if (over) k[i] += 1;
    y[i] = over ? upper[i] : y[i];
  }
}

// Where alpha is dynamic, no x is outside, and one that has stairs has no NaN.
template <class T, bool kDynamic, class AlphaOf>
CG_D SavedBits signed_chunk(const SignedForward& a, int64_t chunk, const Chunk& words, const AlphaOf& alpha_of,
                            float p) {
  float x[kChunk<T>], k[kChunk<T>], y[kChunk<T>];
  widen_chunk<T>(words, x);
  quantize_signed_chunk<T>(x, alpha_of, p, k, y);
  store_chunk<T>(a.y, chunk, round_chunk<T>(y));
  SavedBits saved;
  if (!kDynamic && a.mask) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) saved.mask |= signed_outside<T>(x[i], alpha_of(i).value, p) ? 0 : 1u << i;
  }
  if (a.codes) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) k[i] = kDynamic || k[i] == k[i] ? k[i] : 0;
    saved.codes = bitpack_codes(k, p, packed_width(a.bits));
  }
  return saved;
}

// The same, element by element, for any alphas, alignment and count. next_alpha() is that of the next element.
template <class T, class NextAlpha>
CG_D SavedBits signed_one_by_one(const SignedForward& a, int64_t chunk, int count, NextAlpha next_alpha) {
  using A = compute_t<T>;
  const A p = A(signed_top(a.bits));
  const int64_t start = chunk * kChunk<T>;
  SavedBits saved;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Alpha<T> alpha(next_alpha(), Rounding::nearest);
    const A x = widen(static_cast<const T*>(a.x)[start + i]);
    const Quantized<A> result = alpha.is_regular(p) ? quantize_signed<T>(x, alpha.value, alpha.inverse, p)
                                                    : quantize_signed_any<T>(x, alpha.value, p);
    static_cast<T*>(a.y)[start + i] = narrow<T>(result.y);
    saved.mask |= signed_outside<T>(x, alpha.value, p) ? 0 : 1u << i;
    if (a.codes) saved.codes |= static_cast<uint64_t>(result.code) << (i * packed_width(a.bits));
  }
  return saved;
}

// Calls quantize(chunk, words) for whole chunks, and for the rest one_by_one(chunk, count); stores the bits.
template <class T, class Quantize, class OneByOne>
CG_D void signed_forward(const SignedForward& a, bool vector, bool aligned, const Quantize& quantize,
                         const OneByOne& one_by_one) {
  const MaskKind kind = a.mask ? MaskKind::inside : MaskKind::nothing;
  for_each_chunk<T>(
      a.count, vector,
      [&](int64_t first) {
        Chunk words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) words[u] = load_chunk<T>(a.x, first + u * kThreads);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t chunk = first + u * kThreads;
          write_saved<T>(a, chunk, kChunk<T>, true, kind, a.codes, quantize(chunk, words[u]));
        }
      },
      [&](int64_t chunk, int count) {
        const SavedBits saved = one_by_one(chunk, count);
        write_saved<T>(a, chunk, count, aligned && count == kChunk<T>, kind, a.codes, saved);
      });
}

// Given alphas.
template <class T, AlphaLayout kLayout>
__global__ void __launch_bounds__(kThreads) qsigned_forward_kernel(const SignedForward a, bool aligned) {
  using A = compute_t<T>;
  const auto one_by_one = [&](int64_t chunk, int count) {
    AlphaRun<A> alphas(a.alphas, chunk * kChunk<T>);
    return signed_one_by_one<T>(a, chunk, count, [&] { return alphas.next(); });
  };
  if constexpr (!kVector<T>) {
    signed_forward<T>(a, false, aligned, [](int64_t, const Chunk&) { return SavedBits(); }, one_by_one);
  } else {
    const float p = static_cast<float>(signed_top(a.bits));
    Alpha<T> only;
    if constexpr (kLayout == AlphaLayout::one) {
      only = Alpha<T>(static_cast<const float*>(a.alphas.values)[0], Rounding::nearest);
    }
    const bool vector = aligned && (kLayout != AlphaLayout::one || only.is_regular(p));
    const auto quantize = [&](int64_t chunk, const Chunk& words) {
      const auto quantized = [&](bool is_regular, const auto& alpha_of) {
        if (!is_regular) return one_by_one(chunk, kChunk<T>);
        return signed_chunk<T, false>(a, chunk, words, alpha_of, p);
      };
      if constexpr (kLayout == AlphaLayout::one) {
        return signed_chunk<T, false>(a, chunk, words, [&](int) { return only; }, p);
      } else if constexpr (kLayout == AlphaLayout::by_chunk) {
        const Alpha<T> own(alpha_of_chunk<T>(a.alphas, chunk), Rounding::nearest);
        return quantized(own.is_regular(p), [&](int) { return own; });
      } else {
        Alpha<T> alphas[kChunk<T>];
        AlphaRun<float> run(a.alphas, chunk * kChunk<T>);
        bool is_regular = true;
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
          alphas[i] = Alpha<T>(run.next(), Rounding::nearest);
          is_regular &= alphas[i].is_regular(p);
        }
        return quantized(is_regular, [&](int i) { return alphas[i]; });
      }
    };
    signed_forward<T>(a, vector, aligned, quantize, one_by_one);
  }
}

// The bits of |v|: integers in the order of the numbers, with those of NaN above infinity's, so that the largest of
// them tells of both.
template <class T>
using magnitude_t = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
CG_D magnitude_t<T> magnitude(T v) {
  using Bits = bytes_t<sizeof(T)>;
  return bit_cast<Bits>(v) & static_cast<Bits>(Bits(~Bits(0)) >> 1);
}
template <class T>
CG_D compute_t<T> number_of(magnitude_t<T> bits) {
  return widen(bit_cast<T>(static_cast<bytes_t<sizeof(T)>>(bits)));
}

template <class T>
CG_D uint32_t largest_of(const Chunk& words) {
  constexpr uint32_t kLow = sizeof(T) == 2 ? 0x7fffu : 0x7fffffffu, kHigh = sizeof(T) == 2 ? 0x7fff0000u : 0;
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    low = larger(low, words.w[i] & kLow);
    high = larger(high, words.w[i] & kHigh);
  }
  return larger(low, high >> 16);
}

// The alpha to quantize with: see kAlphaOfZeros.
CG_D float alpha_in_use(bf16 stored) { return stored.bits == 0 ? kAlphaOfZeros : to_float(stored); }

// A chunk of a group with this dynamic alpha, to y and codes.
template <class T>
CG_D void signed_group_chunk(const SignedForward& a, int64_t chunk, const Chunk& words, const Alpha<T>& alpha,
                             float p) {
  SavedBits saved;
  if (alpha.is_regular(p)) {
    const auto alpha_of = [&](int) { return alpha; };
    saved = signed_chunk<T, true>(a, chunk, words, alpha_of, p);
  } else {
    saved = signed_one_by_one<T>(a, chunk, kChunk<T>, [&] { return alpha.value; });
  }
  write_saved<T>(a, chunk, kChunk<T>, true, MaskKind::nothing, a.codes, saved);
}

// Dynamic alphas of groups of 2^shift chunks: those of as many neighbouring lanes.
template <class T>
__global__ void __launch_bounds__(kThreads) qsigned_groups_kernel(const SignedForward a, int shift) {
  const int lanes = 1 << shift;
  const float p = static_cast<float>(signed_top(a.bits));
  const int64_t chunks = a.count / kChunk<T>;
  for_each_whole_chunk<T>(a.x, chunks, [&](int64_t first, const Chunk(&words)[kUnroll]) {
    uint32_t largest[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) largest[u] = largest_of<T>(words[u]);
    largest_of_lanes(largest, lanes);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t chunk = first + u * kThreads;
      if (chunk >= chunks) return;
      const bf16 stored = signed_alpha(number_of<T>(largest[u]), p);
      if ((threadIdx.x & (lanes - 1)) == 0) a.group_alphas[chunk >> shift] = stored;
      signed_group_chunk<T>(a, chunk, words[u], Alpha<T>(alpha_in_use(stored), Rounding::nearest), p);
    }
  });
}

// Dynamic alphas of longer groups of whole chunks, each by a thread block. It reads them twice, the second time from a
// cache.
constexpr int kMaxRowThreads = 256;
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads) qsigned_rows_kernel(const SignedForward a) {
  const float p = static_cast<float>(signed_top(a.bits));
  const int64_t chunks = a.group / kChunk<T>;
  for (int64_t row = blockIdx.x; row * a.group < a.count; row += gridDim.x) {
    const int64_t begin = row * chunks, end = begin + chunks;
    const int apart = blockDim.x;
    uint32_t largest = 0;
    for_each_whole_chunk<T>(a.x, begin, end, apart, kUnroll * apart, [&](int64_t, const Chunk(&words)[kUnroll]) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) largest = larger(largest, largest_of<T>(words[u]));
    });
    const bf16 stored = signed_alpha(number_of<T>(largest_of_block(largest)), p);
    if (threadIdx.x == 0) a.group_alphas[row] = stored;
    const Alpha<T> alpha(alpha_in_use(stored), Rounding::nearest);
    for_each_whole_chunk<T>(a.x, begin, end, apart, kUnroll * apart, [&](int64_t first, const Chunk(&words)[kUnroll]) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t chunk = first + u * apart;
        if (chunk < end) signed_group_chunk<T>(a, chunk, words[u], alpha, p);
      }
    });
  }
}

// Dynamic alphas of any groups, a warp each: as they are stored, and as `qsigned_forward_kernel` is given them.
template <class T>
__global__ void __launch_bounds__(kThreads) qsigned_alphas_kernel(const SignedForward a, compute_t<T>* given) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t groups = a.count / a.group;
  for (int64_t base = int64_t{blockIdx.x} * kWarps; base < groups; base += int64_t{gridDim.x} * kWarps) {
    const int64_t group = base + threadIdx.x / kWarp;
    const int lane = threadIdx.x % kWarp;
    magnitude_t<T> largest = 0;
    for (int64_t i = group < groups ? lane : a.group; i < a.group; i += kWarp) {
      largest = larger(largest, magnitude(static_cast<const T*>(a.x)[group * a.group + i]));
    }
    largest = largest_of_warp(largest);
    if (lane == 0 && group < groups) {
      const bf16 stored = signed_alpha(number_of<T>(largest), static_cast<compute_t<T>>(signed_top(a.bits)));
      a.group_alphas[group] = stored;
      given[group] = alpha_in_use(stored);
    }
  }
}

// Given alphas are checked; dynamic ones, which are stored as bfloat16, may be 0.
CG_D float alpha_of_stored(float given) { return checked(given); }
CG_D double alpha_of_stored(double given) { return checked(given); }
CG_D float alpha_of_stored(bf16 dynamic) { return to_float(dynamic); }

template <int kCount>
CG_D uint64_t read_codes(const uint8_t* from, int64_t chunk, int count, bool whole, int width) {
  switch (width) {
    case 2: return read_bits<kCount, 2>(from, chunk, count, whole);
    case 4: return read_bits<kCount, 4>(from, chunk, count, whole);
    default: return read_bits<kCount, 8>(from, chunk, count, whole);
  }
}

template <class T, class Stored, AlphaLayout kLayout>
__global__ void __launch_bounds__(kThreads) qsigned_dequantize_kernel(const SignedDequantize a, bool aligned) {
  using A = compute_t<T>;
  const int width = packed_width(a.bits);
  const uint32_t low = (1u << width) - 1;
  const A p = A(signed_top(a.bits));
  const auto level_of = [&](uint64_t codes, int i, A alpha) {
    return mul(A(static_cast<uint32_t>(codes >> (i * width)) & low) - p, alpha);
  };
  A only = A(0);
  if constexpr (kLayout == AlphaLayout::one) only = alpha_of_stored(static_cast<const Stored*>(a.alphas.values)[0]);
  for_each_chunk<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          uint64_t codes[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            codes[u] = read_codes<kChunk<T>>(a.codes, first + u * kThreads, kChunk<T>, true, width);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t chunk = first + u * kThreads;
            if constexpr (kLayout == AlphaLayout::by_chunk) {
              only = alpha_of_stored(alpha_of_chunk<T, Stored>(a.alphas, chunk));
            }
            AlphaRun<Stored> run(a.alphas, kLayout == AlphaLayout::by_element ? chunk * kChunk<T> : 0);
            float y[kChunk<T>];
#pragma unroll
            for (int i = 0; i < kChunk<T>; ++i) {
              y[i] = level_of(codes[u], i, kLayout == AlphaLayout::by_element ? alpha_of_stored(run.next()) : only);
            }
            store_chunk<T>(a.y, chunk, round_chunk<T>(y));
          }
        }
      },
      [&](int64_t chunk, int count) {
        const int64_t start = chunk * kChunk<T>;
        const uint64_t codes = read_codes<kChunk<T>>(a.codes, chunk, count, aligned && count == kChunk<T>, width);
        AlphaRun<Stored> run(a.alphas, start);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          static_cast<T*>(a.y)[start + i] = narrow<T>(level_of(codes, i, alpha_of_stored(run.next())));
        }
      });
}

}  // namespace cg::cuda
