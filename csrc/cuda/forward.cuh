// x to y, to the bits saved for backward and to codes.
#pragma once

#include "alphas.cuh"

namespace cg::cuda {

// What is saved of a chunk: its mask bits, as wide as their kind, and its codes.
struct SavedBits {
  uint32_t mask = 0;
  uint64_t codes = 0;
};

// The mask bits of element i of a chunk.
template <class T>
CG_D uint32_t mask_of(MaskKind kind, compute_t<T> x, const Alpha<T>& alpha, compute_t<T> q, int i) {
  const compute_t<T> top = alpha.top(q);
  if (kind == MaskKind::state) return (is_positive(x) ? 1u << 2 * i : 0) + (x > top ? 1u << 2 * i : 0);
  const bool bit = kind == MaskKind::near     ? is_near(x, alpha.value, top)
                   : kind == MaskKind::inside ? is_positive(x) & !(x > top)
                                              : is_positive(x);
  return bit ? 1u << i : 0;
}

// A chunk's codes k + zero, `width` bits each, taken from the low bits of code + 2^23.
template <int kCount>
CG_D uint64_t bitpack_codes(const float (&k)[kCount], float zero, int width) {
  constexpr float kMagic = 0x1p23f;
  const uint32_t up = 1u << width, magic = bit_cast<uint32_t>(kMagic) * (1 + up * (1 + up * (1 + up)));
  uint64_t joined = 0;
#pragma unroll
  for (int first = 0; first < kCount; first += 4) {
    uint32_t four = 0;
#pragma unroll
    for (int i = 3; i >= 0; --i) four = four * up + bit_cast<uint32_t>(k[first + i] + (kMagic + zero));
    joined |= static_cast<uint64_t>(four - magic) << (first * width);
  }
  return joined;
}

template <class T, Rounding R, class AlphaOf>
CG_D SavedBits forward_chunk(const Forward& a, int64_t chunk, const Chunk& words, const AlphaOf& alpha_of, float q,
                             MaskKind kind, bool codes) {
  float x[kChunk<T>], code[kChunk<T>], y[kChunk<T>];
  widen_chunk<T>(words, x);
  quantize_chunk<T, R>(x, alpha_of, q, code, y);
  if (!codes || a.y) store_chunk<T>(a.y, chunk, round_chunk<T>(y));
  SavedBits saved;
  if (kind != MaskKind::nothing) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) saved.mask |= mask_of<T>(kind, x[i], alpha_of(i), q, i);
  }
  if (codes) {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) code[i] = fminf(code[i], q);
    saved.codes = bitpack_codes(code, 0, packed_width(a.bits));
  }
  return saved;
}

// The same, element by element, for any alpha, alignment and count.
template <class T, Rounding R>
CG_D SavedBits forward_one_by_one(const Forward& a, int64_t chunk, int count, MaskKind kind, bool codes) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  const int64_t start = chunk * kChunk<T>;
  AlphaRun<A> alphas(a.alphas, start);
  SavedBits saved;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Alpha<T> alpha(alphas.next(), R);
    const A x = widen(static_cast<const T*>(a.x)[start + i]);
    const Quantized<A> result = quantize_one<T, R>(x, alpha, q);
    if (a.y) static_cast<T*>(a.y)[start + i] = narrow<T>(result.y);
    saved.mask |= mask_of<T>(kind, x, alpha, q, i);
    if (codes) saved.codes |= static_cast<uint64_t>(result.code) << (i * packed_width(a.bits));
  }
  return saved;
}

template <class T, class Params>
CG_D void write_saved(const Params& a, int64_t chunk, int count, bool whole, MaskKind kind, bool codes,
                      const SavedBits& saved) {
  if (kind == MaskKind::state) write_bits<kChunk<T>, 2>(a.mask, chunk, count, whole, saved.mask);
  else if (kind != MaskKind::nothing) write_bits<kChunk<T>, 1>(a.mask, chunk, count, whole, saved.mask);
  if (codes) {
    switch (packed_width(a.bits)) {
      case 1: return write_bits<kChunk<T>, 1>(a.codes, chunk, count, whole, saved.codes);
      case 2: return write_bits<kChunk<T>, 2>(a.codes, chunk, count, whole, saved.codes);
      case 4: return write_bits<kChunk<T>, 4>(a.codes, chunk, count, whole, saved.codes);
      default: return write_bits<kChunk<T>, 8>(a.codes, chunk, count, whole, saved.codes);
    }
  }
}

// quantize(chunk, words) quantizes a whole chunk; the rest goes element by element.
template <class T, Rounding R, class Quantize>
CG_D void forward(const Forward& a, bool aligned, bool vector, MaskKind kind, bool codes, const Quantize& quantize) {
  for_each_chunk<T>(
      a.count, aligned && vector,
      [&](int64_t first) {
        Chunk words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) words[u] = load_chunk<T>(a.x, first + u * kThreads);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t chunk = first + u * kThreads;
          write_saved<T>(a, chunk, kChunk<T>, true, kind, codes, quantize(chunk, words[u]));
        }
      },
      [&](int64_t chunk, int count) {
        const SavedBits saved = forward_one_by_one<T, R>(a, chunk, count, kind, codes);
        write_saved<T>(a, chunk, count, aligned && count == kChunk<T>, kind, codes, saved);
      });
}

// One alpha.
template <class T, Rounding R, MaskKind kKind, bool kCodes>
__global__ void __launch_bounds__(kThreads) qrelu_forward_kernel(const Forward a, bool aligned) {
  const float q = static_cast<float>((1 << a.bits) - 1);
  const Alpha<T> only(static_cast<const float*>(a.alphas.values)[0], R);
  const auto alpha_of = [&](int) { return only; };
  forward<T, R>(a, aligned, only.is_regular(q), kKind, kCodes, [&](int64_t chunk, const Chunk& words) {
    return forward_chunk<T, R>(a, chunk, words, alpha_of, q, kKind, kCodes);
  });
}

// Many alphas. kByChunk: one per chunk.
template <class T, Rounding R, bool kByChunk>
__global__ void __launch_bounds__(kThreads) qrelu_forward_channels_kernel(const Forward a, bool aligned) {
  const MaskKind kind = a.kind;
  const bool codes = a.codes;
  if constexpr (kVector<T>) {
    const float q = static_cast<float>((1 << a.bits) - 1);
    forward<T, R>(a, aligned, true, kind, codes, [&](int64_t chunk, const Chunk& words) {
      const auto quantized = [&](bool is_regular, const auto& alpha_of) {
        if (!is_regular) return forward_one_by_one<T, R>(a, chunk, kChunk<T>, kind, codes);
        return forward_chunk<T, R>(a, chunk, words, alpha_of, q, kind, codes);
      };
      if constexpr (kByChunk) {
        const Alpha<T> own(alpha_of_chunk<T>(a.alphas, chunk), R);
        return quantized(own.is_regular(q), [&](int) { return own; });
      } else {
        Alpha<T> alphas[kChunk<T>];
        AlphaRun<float> run(a.alphas, chunk * kChunk<T>);
        bool is_regular = true;
#pragma unroll
        for (int i = 0; i < kChunk<T>; ++i) {
          alphas[i] = Alpha<T>(run.next(), R);
          is_regular &= alphas[i].is_regular(q);
        }
        return quantized(is_regular, [&](int i) { return alphas[i]; });
      }
    });
  } else {
    forward<T, R>(a, aligned, false, kind, codes, [](int64_t, const Chunk&) { return SavedBits(); });
  }
}

}  // namespace cg::cuda
