// x to y, to the bits kept for the backward, and to codes.
#pragma once

#include "steps.cuh"

namespace cg::cuda {

// What is kept of a pack: its mask bits, of the width of their kind, and its codes.
struct KeptBits {
  uint32_t mask = 0;
  uint64_t codes = 0;
};

// The mask bits of element i of a pack.
template <class A>
CG_D uint32_t mask_of(MaskKind kind, A x, A top, int i) {
  if (kind == MaskKind::state) return (is_positive(x) ? 1u << 2 * i : 0) + (x > top ? 1u << 2 * i : 0);
  return (kind == MaskKind::inside ? is_positive(x) & !(x > top) : is_positive(x)) ? 1u << i : 0;
}

// The codes of a pack, `width` bits each. They are taken from the low bits of code + 2^23.
template <int kCount>
CG_D uint64_t join_codes(const float (&codes)[kCount], float q, int width) {
  constexpr float kMagic = 0x1p23f;
  const uint32_t up = 1u << width, magic = bit_cast<uint32_t>(kMagic) * (1 + up * (1 + up * (1 + up)));
  uint64_t joined = 0;
#pragma unroll
  for (int first = 0; first < kCount; first += 4) {
    uint32_t four = 0;
#pragma unroll
    for (int i = 3; i >= 0; --i) four = four * up + bit_cast<uint32_t>(fminf(codes[first + i], q) + kMagic);
    joined |= static_cast<uint64_t>(four - magic) << (first * width);
  }
  return joined;
}

template <class T, Rounding R, class StepOf>
CG_D KeptBits forward_pack(const Forward& a, int64_t pack, const Words& words, const StepOf& step, float q,
                           MaskKind kind, bool codes) {
  float x[kPack<T>], code[kPack<T>], y[kPack<T>];
  unpack<T>(words, x);
  quantize_pack<T, R>(x, step, q, code, y);
  if (!codes || a.y) store_words<T>(a.y, pack, round_all<T>(y));
  KeptBits kept;
  if (kind != MaskKind::nothing) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) kept.mask |= mask_of(kind, x[i], step(i).top(q), i);
  }
  if (codes) kept.codes = join_codes(code, q, packed_width(a.bits));
  return kept;
}

// The same, element by element, for any alpha, alignment and count.
template <class T, Rounding R>
CG_D KeptBits forward_one_by_one(const Forward& a, int64_t pack, int count, MaskKind kind, bool codes) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  const int64_t start = pack * kPack<T>;
  Run<A> alphas(a.steps, start);
  KeptBits kept;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Step<T> step(alphas.next(), R);
    const A x = widen(static_cast<const T*>(a.x)[start + i]);
    const Quantized<A> result = quantize_one<T, R>(x, step, q);
    if (a.y) static_cast<T*>(a.y)[start + i] = narrow<T>(result.y);
    kept.mask |= mask_of(kind, x, step.top(q), i);
    if (codes) kept.codes |= static_cast<uint64_t>(result.code) << (i * packed_width(a.bits));
  }
  return kept;
}

template <class T>
CG_D void write_kept(const Forward& a, int64_t pack, int count, bool whole, MaskKind kind, bool codes,
                     const KeptBits& kept) {
  if (kind == MaskKind::state) write_bits<kPack<T>, 2>(a.mask, pack, count, whole, kept.mask);
  else if (kind != MaskKind::nothing) write_bits<kPack<T>, 1>(a.mask, pack, count, whole, kept.mask);
  if (codes) {
    switch (packed_width(a.bits)) {
      case 1: return write_bits<kPack<T>, 1>(a.codes, pack, count, whole, kept.codes);
      case 2: return write_bits<kPack<T>, 2>(a.codes, pack, count, whole, kept.codes);
      case 4: return write_bits<kPack<T>, 4>(a.codes, pack, count, whole, kept.codes);
      default: return write_bits<kPack<T>, 8>(a.codes, pack, count, whole, kept.codes);
    }
  }
}

// pack_of(pack, words) quantizes a whole pack; what is left is done one by one.
template <class T, Rounding R, class PackOf>
CG_D void forward(const Forward& a, bool aligned, bool vector, MaskKind kind, bool codes, const PackOf& pack_of) {
  for_each_pack<T>(
      a.count, aligned && vector,
      [&](int64_t first) {
        Words words[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) words[u] = load_words<T>(a.x, first + u * kThreads);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t pack = first + u * kThreads;
          write_kept<T>(a, pack, kPack<T>, true, kind, codes, pack_of(pack, words[u]));
        }
      },
      [&](int64_t pack, int count) {
        const KeptBits kept = forward_one_by_one<T, R>(a, pack, count, kind, codes);
        write_kept<T>(a, pack, count, aligned && count == kPack<T>, kind, codes, kept);
      });
}

// Of one alpha.
template <class T, Rounding R, MaskKind kKind, bool kCodes>
__global__ void __launch_bounds__(kThreads) qrelu_forward_kernel(const Forward a, bool aligned) {
  const float q = static_cast<float>((1 << a.bits) - 1);
  const Step<T> only(static_cast<const float*>(a.steps.alpha)[0], R);
  const auto step = [&](int) { return only; };
  forward<T, R>(a, aligned, only.simple(q), kKind, kCodes, [&](int64_t pack, const Words& words) {
    return forward_pack<T, R>(a, pack, words, step, q, kKind, kCodes);
  });
}

// Of many alphas. kByPack: a pack has one of them.
template <class T, Rounding R, bool kByPack>
__global__ void __launch_bounds__(kThreads) qrelu_forward_channels_kernel(const Forward a, bool aligned) {
  const MaskKind kind = a.kind;
  const bool codes = a.codes;
  if constexpr (kVector<T>) {
    const float q = static_cast<float>((1 << a.bits) - 1);
    forward<T, R>(a, aligned, true, kind, codes, [&](int64_t pack, const Words& words) {
      const auto quantized = [&](bool simple, const auto& step) {
        if (!simple) return forward_one_by_one<T, R>(a, pack, kPack<T>, kind, codes);
        return forward_pack<T, R>(a, pack, words, step, q, kind, codes);
      };
      if constexpr (kByPack) {
        const Step<T> own(alpha_of_pack<T>(a.steps, pack), R);
        return quantized(own.simple(q), [&](int) { return own; });
      } else {
        Step<T> steps[kPack<T>];
        Run<float> alphas(a.steps, pack * kPack<T>);
        bool simple = true;
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          steps[i] = Step<T>(alphas.next(), R);
          simple &= steps[i].simple(q);
        }
        return quantized(simple, [&](int i) { return steps[i]; });
      }
    });
  } else {
    forward<T, R>(a, aligned, false, kind, codes, [](int64_t, const Words&) { return KeptBits(); });
  }
}

}  // namespace cg::cuda
