// The signed staircase: x to dynamic alphas, to y and to what is saved for backward; codes to y.
#pragma once

#include "../../math/signed.h"
#include "alphas.h"
#include "blocks.h"
#include "concepts.h"
#include "signed_table.h"

namespace cg::CG_ISA {
namespace {

// Numbers of T as unsigned integers.
template <class T>
using bits_t = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// The largest magnitude, or a NaN if there is one: magnitudes are in the order of their bits, and NaNs above infinity.
template <class T>
CG_HD T largest_magnitude(const T* x, int64_t count) {
  using Bits = bits_t<T>;
  Bits largest = 0;
  int64_t i = 0;
  if constexpr (kHasMagnitudes<T>) {
    constexpr int kCount = Magnitudes<T>::kCount;
    if (count >= kCount) {
      auto row = Magnitudes<T>::load(x);
      for (i = kCount; i + kCount <= count; i += kCount) row = Magnitudes<T>::larger(row, Magnitudes<T>::load(x + i));
      largest = row.largest();
    }
  }
  for (; i < count; ++i) {
    const Bits magnitude = bit_cast<Bits>(x[i]) & static_cast<Bits>(static_cast<Bits>(~Bits(0)) >> 1);
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
// Returns whether all are regular. In loops so simple that compilers vectorise them.
template <class T>
bool signed_alphas_of(const SignedForward& a, int64_t begin, int64_t end, void* to_values, void* to_inverses) {
  using A = compute_t<T>;
  using Bits = bits_t<A>;
  const A p = A(signed_top(a.bits));
  A *const values = static_cast<A*>(to_values), *const inverses = static_cast<A*>(to_inverses);
  const T* x = static_cast<const T*>(a.x) + begin * a.group;
  bf16* const alphas = a.group_alphas + begin;
  const int64_t count = end - begin, group = a.group;
  for (int64_t i = 0; i < count; ++i, x += group) values[i] = wide(largest_magnitude(x, group));
  for (int64_t i = 0; i < count; ++i) alphas[i] = signed_alpha(values[i], p);
  Bits least = ~Bits(0), most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const A alpha = A(to_float(alphas[i])), value = alpha == A(0) ? A(kAlphaOfZeros) : alpha;
    values[i] = value;
    inverses[i] = A(1) / value;
    const Bits bits = bit_cast<Bits>(value);
    least = bits < least ? bits : least;
    most = bits > most ? bits : most;
  }
  // What is regular is an interval, and NaN is above it.
  return regular<T>(bit_cast<A>(least), p) && regular<T>(bit_cast<A>(most), p);
}

bool signed_alphas(const SignedForward& a, int64_t begin, int64_t end, void* values, void* inverses) {
  bool all_regular = true;
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    all_regular = signed_alphas_of<T>(a, begin, end, values, inverses);
  });
  return all_regular;
}

// One alpha for each 2^shift elements, at least a pair of vectors.
template <class A>
struct AlphaPerRun {
  const A* alpha;
  const A* inverse;
  int shift;
  int64_t first = 0;
  CG_HD Vec<A> alpha_at(int i) const { return Vec<A>(alpha[(first + i) >> shift]); }
  CG_HD Vec<A> inverse_at(int i) const { return Vec<A>(inverse[(first + i) >> shift]); }
  CG_HD AlphaPerRun of(int64_t block) const { return {alpha, inverse, shift, block * kBlock}; }
};

// One alpha for each 2^shift blocks.
template <class A>
struct AlphaPerBlocks {
  const A* alpha;
  const A* inverse;
  int shift;
  CG_HD OneAlpha<A> of(int64_t block) const {
    return {Vec<A>(alpha[block >> shift]), Vec<A>(inverse[block >> shift]), 0};
  }
};

// for_each_range, of the alphas of groups.
template <class A, class Body>
CG_HD void for_each_group_range(const Alphas& alphas, int64_t begin, int64_t end, const Body& body) {
  const int64_t run = alphas.inner;
  const auto shared = [&]<class Source>(int64_t unit) {
    body(begin, end,
         Source{static_cast<const A*>(alphas.values), static_cast<const A*>(alphas.inverses),
                __builtin_ctzll(run / unit)});
  };
  if (run >= kBlock && (run & (run - 1)) == 0) {
    shared.template operator()<AlphaPerBlocks<A>>(kBlock);
  } else if (run >= 2 * Lanes<Vec<A>>::kCount && (run & (run - 1)) == 0) {
    shared.template operator()<AlphaPerRun<A>>(1);
  } else {
    for_each_range<A>(alphas, begin, end, body);
  }
}

// What is known of alphas: nothing, that they are regular, or that they are also those of groups, with normal levels.
enum class Alpha { any, regular, of_groups };

template <class T, Alpha kAlpha, class V>
CG_HD Quantized<V> quantize_signed_vec(V x, V alpha, V inverse, V p) {
  if constexpr (kAlpha == Alpha::any) return quantize_signed_any<T>(x, alpha, p);
  else if constexpr (kAlpha == Alpha::regular) return quantize_signed<T>(x, alpha, inverse, p);
  else return quantize_signed_of_group<T>(x, alpha, inverse, p);
}

// Packs the codes of pairs of vectors as they come, a group of compare keys at a time. (Through bytes in memory it
// takes as long again as all else.)
template <class T, bool kPacks>
struct PackedCodes {
  CG_HD PackedCodes(uint8_t*, int) {}
};
template <class T>
struct PackedCodes<T, true> {
  using Key = CompareKey<T>;
  using V = Vec<compute_t<T>>;
  static constexpr int kPair = 2 * Lanes<V>::kCount, kGroup = Key::kGroup * Key::kCount;
  uint8_t* const to;
  const int width;
  typename Key::Index found[Key::kGroup];
  CG_HD PackedCodes(uint8_t* packed, int bits) : to(packed), width(bits) {}

  CG_HD void add(int i, Pair<V> codes) {
    const int at = i % kGroup / Key::kCount;
    if constexpr (kPair > Key::kCount) found[at] = Key::whole(codes.first), found[at + 1] = Key::whole(codes.second);
    else found[at] = Key::whole(codes);
    if ((i + kPair) % kGroup != 0) return;
    uint8_t* const group = to + (i + kPair - kGroup) * width / 8;
    if (width == 2) Key::template store_codes<2>(group, found);
    else if (width == 4) Key::template store_codes<4>(group, found);
    else Key::template store_codes<8>(group, found);
  }
};

// The first `bits` of `from`, and zeros to the end of a byte.
CG_HD void write_part(uint8_t* to, const uint8_t* from, int bits) {
  memcpy(to, from, bits / 8);
  if (bits % 8 != 0) to[bits / 8] = static_cast<uint8_t>(from[bits / 8] & ((1 << bits % 8) - 1));
}

// In pairs of vectors where both have one alpha.
template <class T, Alpha kAlpha, bool kCodes, class Source>
void signed_forward_range(const SignedForward& args, int64_t first, int64_t last, const Source& source_of_all) {
  using A = compute_t<T>;
  using V = Vec<A>;
  constexpr int kCount = Lanes<V>::kCount;
  constexpr bool kPairs = !std::is_same_v<Source, AlphaPerElement<A>>;
  constexpr bool kPacks = kCodes && kPairs && CompareKey<T>::kArithmetic;
  const SignedForward a = args;  // local copies: stores through char pointers cannot alias them
  const Source sources = source_of_all;
  const V p(A(signed_top(a.bits)));
  const int width = packed_width(a.bits);
  for (int64_t block = first; block < last; ++block) {
    const auto& source = sources.of(block);
    const int count = block_count(a.count, block);
    T x_copy[kBlock], y_copy[kBlock];
    if (a.next) prefetch(static_cast<const T*>(a.next) + block * kBlock, 0);
    else prefetch(static_cast<const T*>(a.x) + block * kBlock);
    const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
    const bool whole = count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
    uint8_t codes[kBlock];
    uint64_t outside = 0;
    if constexpr (kPairs) {
      PackedCodes<T, kPacks> packed(whole ? a.codes + block * 8 * width : codes, width);
#pragma GCC unroll 16
      for (int i = 0; i < kBlock; i += 2 * kCount) {
        const auto v = load_pair(x + i);
        const V alpha = source.alpha_at(i), inverse = source.inverse_at(i);
        const Quantized<V> even = quantize_signed_vec<T, kAlpha>(v.first, alpha, inverse, p);
        const Quantized<V> odd = quantize_signed_vec<T, kAlpha>(v.second, alpha, inverse, p);
        store_rounded_pair(y + i, Pair{even.y, odd.y}, stream);
        if constexpr (kPacks) packed.add(i, Pair{even.code, odd.code});
        else if constexpr (kCodes) store_code_pair<T>(codes + i, Pair{even.code, odd.code});
      }
    } else {
      for (int i = 0; i < kBlock; i += kCount) {
        const V v = Io<T>::load(x + i);
        const Quantized<V> result = quantize_signed_vec<T, kAlpha>(v, source.alpha_at(i), source.inverse_at(i), p);
        if (stream) Io<T>::stream(y + i, result.y);
        else Io<T>::store(y + i, result.y);
        if constexpr (kCodes) Lanes<V>::store_codes(codes + i, result.code);
      }
    }
    if (a.mask) {
      if (a.group == 0) {  // under a dynamic alpha nothing is outside
        for (int i = 0; i < kBlock; i += kCount) {
          outside |= Lanes<V>::bits(signed_outside<T>(Io<T>::load(x + i), source.alpha_at(i), p)) << i;
        }
      }
      const uint64_t inside = ~outside & (~uint64_t{0} >> (kBlock - count));
      write_packed<1>(a.mask, block, count, &inside);
    }
    if (!whole) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
    if constexpr (kPacks) {
      if (!whole) write_part(a.codes + block * 8 * width, codes, count * width);
    } else if constexpr (kCodes) {
      if (!whole) memset(codes + count, 0, kBlock - count);  // 0 has another code
      write_codes(a.codes, block, count, width, codes);
    }
  }
}

template <class T, Alpha kAlpha>
void signed_forward_of(const SignedForward& a, int64_t begin, int64_t end) {
  with_flag(a.codes, [&](auto codes) {
    const auto body = [&](int64_t first, int64_t last, const auto& source) {
      signed_forward_range<T, kAlpha, codes.value>(a, first, last, source);
    };
    if constexpr (kAlpha == Alpha::of_groups) for_each_group_range<compute_t<T>>(a.alphas, begin, end, body);
    else for_each_range<compute_t<T>>(a.alphas, begin, end, body);
  });
}

// The whole blocks in [begin, end) where groups are whole blocks too, enough to be worth a table. Returns the block
// after them.
template <class T>
int64_t signed_forward_by_table(const SignedForward& args, int64_t begin, int64_t end) {
  const SignedForward a = args;
  const int64_t run = a.alphas.inner / kBlock, whole = end < a.count / kBlock ? end : a.count / kBlock;
  if (a.bits > 4 || run < 2 || a.alphas.inner % kBlock != 0) return begin;
  const float p = static_cast<float>(signed_top(a.bits));
  const int code_bytes = 8 * packed_width(a.bits);
  with_flag(a.codes, [&](auto codes) {
    if (begin >= whole) return;
    const float* alpha = static_cast<const float*>(a.alphas.values) + begin / run;
    SignedTable<T> next(*alpha, p);
    for (int64_t block = begin, last; block < whole;) {
      last = (block / run + 1) * run;
      if (last < whole) ++alpha;
      else last = whole;
      const SignedTable<T> table = next;
      next = SignedTable<T>(*alpha, p);  // begun ahead of time, as it waits for itself at each step
      for (; block < last; ++block) {
        const T* x = static_cast<const T*>(a.x) + block * kBlock;
        T* y = static_cast<T*>(a.y) + block * kBlock;
        if (a.next) prefetch(static_cast<const T*>(a.next) + block * kBlock, 0);
        table.template store<codes.value>(x, y, codes.value ? a.codes + block * code_bytes : nullptr, a.bits, a.stream);
        if (a.mask) memset(a.mask + block * 8, 0xff, 8);  // nothing is outside
      }
    }
  });
  return begin < whole ? whole : begin;
}

// Whether all levels of all groups are normal.
template <class T>
bool all_normal(const Alphas& alphas) {
  const auto* values = static_cast<const compute_t<T>*>(alphas.values);
  bool normal = true;
  for (int64_t i = 0; i < alphas.channels; ++i) normal &= normal_levels<T>(values[i]);
  return normal;
}

void signed_forward(const SignedForward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if constexpr (SignedTable<T>::kServed) {
      if (a.group > 0 && a.alphas.regular) begin = signed_forward_by_table<T>(a, begin, end);
    }
    with_regular(a.alphas, [&](auto regular) {
      if constexpr (!regular.value) signed_forward_of<T, Alpha::any>(a, begin, end);
      else if (a.group == 0 || !all_normal<T>(a.alphas)) signed_forward_of<T, Alpha::regular>(a, begin, end);
      else signed_forward_of<T, Alpha::of_groups>(a, begin, end);
    });
  });
  if (a.stream) stream_fence();
}

template <class T, class Source>
void signed_dequantize_range(const SignedDequantize& args, int64_t first, int64_t last, const Source& source_of_all) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const SignedDequantize a = args;
  const Source sources = source_of_all;
  const V p(A(signed_top(a.bits)));
  for (int64_t block = first; block < last; ++block) {
    const auto& source = sources.of(block);
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
    const auto body = [&](int64_t first, int64_t last, const auto& source) {
      signed_dequantize_range<T>(a, first, last, source);
    };
    if (a.group > 0) for_each_group_range<compute_t<T>>(a.alphas, begin, end, body);
    else for_each_range<compute_t<T>>(a.alphas, begin, end, body);
  });
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
