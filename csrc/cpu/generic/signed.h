// The signed staircase: x to dynamic alphas, to y and to what is saved for backward; codes to y.
#pragma once

#include "../../math/signed.h"
#include "alphas.h"
#include "blocks.h"
#include "concepts.h"

namespace cg::CG_ISA {
namespace {

// Numbers of T as unsigned integers.
template <class T>
using bits_t = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// The largest magnitude, or a NaN if there is one: magnitudes are in the order of their bits, and NaNs above infinity.
template <class T>
CG_HD T largest_magnitude(const T* x, int64_t count) {
  using Bits = bits_t<T>;
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits(0)) >> 1;
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits magnitude = bit_cast<Bits>(x[i]) & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bit_cast<T>(largest);
}

CG_HD double wide(double v) { return v; }
template <class T>
CG_HD float wide(T v) {
  return to_float(v);
}

// The alphas of groups [begin, end) of x; in the compute type, and with reciprocals, from `values` and `inverses` on.
// Returns whether all are regular.
template <class T>
bool signed_alphas_of(const SignedForward& a, int64_t begin, int64_t end, void* to_values, void* to_inverses) {
  using A = compute_t<T>;
  const A p = A(signed_top(a.bits));
  A *const values = static_cast<A*>(to_values), *const inverses = static_cast<A*>(to_inverses);
  const T* x = static_cast<const T*>(a.x) + begin * a.group;
  bf16* const alphas = a.group_alphas + begin;
  const int64_t count = end - begin;
  for (int64_t i = 0; i < count; ++i, x += a.group) values[i] = wide(largest_magnitude(x, a.group));
  bool all_regular = true;
  for (int64_t i = 0; i < count; ++i) {
    alphas[i] = signed_alpha(values[i], p);
    const A alpha = A(to_float(alphas[i]));
    values[i] = alpha == A(0) ? A(kAlphaOfZeros) : alpha;
    inverses[i] = A(1) / values[i];
    all_regular &= regular<T>(values[i], p);
  }
  return all_regular;
}

bool signed_alphas(const SignedForward& a, int64_t begin, int64_t end, void* values, void* inverses) {
  bool all_regular = true;
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    all_regular = signed_alphas_of<T>(a, begin, end, values, inverses);
  });
  return all_regular;
}

template <class T, bool kRegular, class V>
CG_HD Quantized<V> quantize_signed_vec(V x, V alpha, V inverse, V p) {
  if constexpr (kRegular) return quantize_signed<T>(x, alpha, inverse, p);
  else return quantize_signed_any<T>(x, alpha, p);
}

// Under a dynamic alpha nothing is outside.
template <class T, bool kRegular, bool kCodes, class Source>
void signed_forward_range(const SignedForward& args, int64_t first, int64_t last, const Source& source) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const SignedForward a = args;  // a local copy: stores through char pointers cannot alias it
  const V p(A(signed_top(a.bits)));
  for (int64_t block = first; block < last; ++block) {
    const int count = block_count(a.count, block);
    T x_copy[kBlock], y_copy[kBlock];
    prefetch(static_cast<const T*>(a.x) + block * kBlock);
    const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
    const bool whole = count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
    uint8_t codes[kBlock];
    uint64_t outside = 0;
    for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const V v = Io<T>::load(x + i), alpha = source.alpha_at(i);
      const Quantized<V> result = quantize_signed_vec<T, kRegular>(v, alpha, source.inverse_at(i), p);
      if (stream) Io<T>::stream(y + i, result.y);
      else Io<T>::store(y + i, result.y);
      if (a.mask && a.group == 0) outside |= Lanes<V>::bits(signed_outside<T>(v, alpha, p)) << i;
      if constexpr (kCodes) Lanes<V>::store_codes(codes + i, result.code);
    }
    if (!whole) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
    if (a.mask) {
      const uint64_t inside = ~outside & (~uint64_t{0} >> (kBlock - count));
      write_packed<1>(a.mask, block, count, &inside);
    }
    if constexpr (kCodes) {
      if (!whole) memset(codes + count, 0, kBlock - count);  // 0 has another code
      write_codes(a.codes, block, count, packed_width(a.bits), codes);
    }
  }
}

void signed_forward(const SignedForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    with_regular(a.alphas, [&](auto regular) {
      with_flag(a.codes, [&](auto codes) {
        for_each_range<compute_t<T>>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
          signed_forward_range<T, regular.value, codes.value>(a, first, last, source);
        });
      });
    });
  });
  if (a.stream) stream_fence();
}

template <class T, class Source>
void signed_dequantize_range(const SignedDequantize& args, int64_t first, int64_t last, const Source& source) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const SignedDequantize a = args;
  const V p(A(signed_top(a.bits)));
  for (int64_t block = first; block < last; ++block) {
    const int count = block_count(a.count, block);
    uint8_t codes[kBlock];
    read_codes(a.codes, block, count, packed_width(a.bits), codes);
    T copy[kBlock];
    const bool whole = count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : copy;
    for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const V v = round_for_store<T>(mul(Lanes<V>::load_codes(codes + i) - p, source.alpha_at(i)));
      if (stream) Io<T>::stream(y + i, v);
      else Io<T>::store(y + i, v);
    }
    if (!whole) memcpy(static_cast<T*>(a.y) + block * kBlock, copy, count * sizeof(T));
  }
}

void signed_dequantize(const SignedDequantize& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    for_each_range<compute_t<T>>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
      signed_dequantize_range<T>(a, first, last, source);
    });
  });
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
