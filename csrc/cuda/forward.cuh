// x to y, to the bits kept for the backward, and to codes.
#pragma once

#include "steps.cuh"

namespace cg::cuda {

// What is kept of a pack: its mask bits, of the width of their kind, and its codes.
struct KeptBits {
  uint32_t mask = 0;
  uint64_t codes = 0;
};

// The mask bits of one element.
template <class A>
CG_D uint32_t mask_of(MaskKind kind, A x, A top) {
  const bool positive = is_positive(x), above = x > top;
  if (kind == MaskKind::state) return above ? 2 : positive;
  return kind == MaskKind::inside ? positive && !above : positive;
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
  codes_of<T, R>(x, step, q, code);
  if (a.y) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) y[i] = mul(code[i], step(i).alpha);
    store_words<T>(a.y, pack, round_all<T>(y));
  }
  KeptBits kept;
  if (kind != MaskKind::nothing) {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) kept.mask |= mask_of(kind, x[i], step(i).top) << (i * mask_width(kind));
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
    const Step<T> step(alphas.next(), q, R);
    const A x = widen(static_cast<const T*>(a.x)[start + i]);
    const Quantized<A> result = quantize_one<T, R>(x, step, q);
    if (a.y) static_cast<T*>(a.y)[start + i] = narrow<T>(result.y);
    kept.mask |= mask_of(kind, x, step.top) << (i * mask_width(kind));
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

// kKind alone is kept, of one alpha; under kAny, whatever is asked for, and under kChannels of many alphas.
template <class T, Rounding R, MaskKind kKind, bool kAny, bool kChannels>
__global__ void __launch_bounds__(kThreads) qrelu_forward_kernel(const Forward a, bool aligned) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  const MaskKind kind = kAny ? a.kind : kKind;
  const bool codes = kAny && a.codes;
  const Step<T> only = kChannels ? Step<T>() : Step<T>(static_cast<const A*>(a.steps.alpha)[0], q, R);
  for_each_pack<T>(
      a.count, aligned && (kChannels || only.regular),
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          Words words[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) words[u] = load_words<T>(a.x, first + u * kThreads);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t pack = first + u * kThreads;
            KeptBits kept;
            if constexpr (kChannels) {
              Step<T> steps[kPack<T>];
              Run<A> alphas(a.steps, pack * kPack<T>);
              bool regular = true;
#pragma unroll
              for (int i = 0; i < kPack<T>; ++i) {
                steps[i] = Step<T>(alphas.next(), q, R);
                regular &= steps[i].regular;
              }
              const auto step = [&](int i) { return steps[i]; };
              if (regular) kept = forward_pack<T, R>(a, pack, words[u], step, q, kind, codes);
              else kept = forward_one_by_one<T, R>(a, pack, kPack<T>, kind, codes);
            } else {
              const auto step = [&](int) { return only; };
              kept = forward_pack<T, R>(a, pack, words[u], step, q, kind, codes);
            }
            write_kept<T>(a, pack, kPack<T>, true, kind, codes, kept);
          }
        }
      },
      [&](int64_t pack, int count) {
        const KeptBits kept = forward_one_by_one<T, R>(a, pack, count, kind, codes);
        write_kept<T>(a, pack, count, aligned && count == kPack<T>, kind, codes, kept);
      });
}

}  // namespace cg::cuda
