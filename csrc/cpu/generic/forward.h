// x to y, to the bits saved for backward and to codes.
#pragma once

#include <vector>

#include "alphas.h"
#include "blocks.h"
#include "quantize.h"
#include "staircases.h"

namespace cg::CG_ISA {
namespace {

// The bits of a block's x that are near the range. Not inlined: it would be in each of the loops, which have no use of
// their own for its numbers.
template <class T, class Source>
__attribute__((noinline)) uint64_t near_bits(const T* x, const Source& source, int bits) {
  using V = Vec<compute_t<T>>;
  const V q(compute_t<T>((1 << bits) - 1));
  uint64_t near = 0;
  for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
    const V alpha = source.alpha_at(i);
    near |= Lanes<V>::bits(is_near(Io<T>::load(x + i), alpha, level<T>(q, alpha))) << i;
  }
  return near;
}

template <class T, Rounding R, bool kRegular, bool kCodes, class Source>
void forward_range(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const Forward a = args;  // a local copy: stores through char pointers cannot alias it
  const V q(A((1 << a.bits) - 1));
  for (int64_t block = first; block < last; ++block) {
    const int count = block_count(a.count, block);
    T x_copy[kBlock], y_copy[kBlock];
    prefetch(static_cast<const T*>(a.x) + block * kBlock);
    const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
    const bool whole = a.y && count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
    uint8_t codes[kBlock];
    uint64_t positive = 0, above = 0;
    const uint64_t near = a.kind == MaskKind::near ? near_bits(x, source, a.bits) : 0;  // first, as y may be x
    for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const V v = Io<T>::load(x + i), alpha = source.alpha_at(i);
      const Quantized<V> result = quantize_vec<T, R, kRegular>(v, alpha, source.inverse_at(i), q);
      if (stream) Io<T>::stream(y + i, result.y);
      else Io<T>::store(y + i, result.y);
      positive |= Lanes<V>::bits(is_positive(v)) << i;
      above |= Lanes<V>::bits(v > level<T>(q, alpha)) << i;
      if constexpr (kCodes) Lanes<V>::store_codes(codes + i, result.code);
    }
    if (a.y && count < kBlock) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
    if (a.mask) write_mask(a.mask, a.kind, block, count, positive & ~above, above, near);
    if constexpr (kCodes) write_codes(a.codes, block, count, packed_width(a.bits), codes);
  }
}

// Returns whether it ran: not if the staircase is not exact for this alpha.
template <class T, bool kCodes, class Staircase, class Source>
bool forward_staircase(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  constexpr int kVecs = Staircase::kVecs;
  constexpr bool kOneAlpha = std::is_same_v<Source, OneAlpha<float>>;
  const Forward a = args;
  const Element* const x_of_all = static_cast<const Element*>(a.x);
  Element* const y_of_all = static_cast<Element*>(a.y);
  const MaskKind kind = a.kind;
  const int bits = a.bits, mask_bytes = 8 * mask_width(kind), code_bytes = 8 * packed_width(bits);
  uint8_t *const mask_of_all = a.mask, *const codes_of_all = a.codes;
  const bool stream = a.stream;
  const int64_t whole = last < a.count / kBlock ? last : a.count / kBlock;
  // all_states: `kind` is known to be `state`. stream: a constant or a bool. With few other instructions branches cost
  // time.
  const auto run = [&](const auto& staircase_at, auto all_states, auto stream) {
    for (int64_t block = first; block < whole; ++block) {
      const Element* x = x_of_all + block * kBlock;
      Key held[kBlock / Key::kCount];
      bool any_nan;
      if constexpr (Key::kHoldsBlock) {
        for (int i = 0; i < kBlock / Key::kCount; ++i) {
          const Element* p = x + i * Key::kCount;
          held[i] = stream ? Key::load_without_prefetch(p) : Key::load(p);
        }
        any_nan = Key::any_nan(held);
      } else {
        any_nan = Key::any_nan(x);
      }
      if (any_nan) {
        forward_range<T, Staircase::kRounding, true, kCodes>(args, block, block + 1, source.of(block));
        for (int first = 0; first < kBlock; first += kVecs * Key::kCount) staircase_at(first);  // keeps its turn
        continue;
      }
      prefetch(x);
      if (kind == MaskKind::near) {  // first, as y may be x
        const uint64_t near = near_bits(static_cast<const T*>(a.x) + block * kBlock, source.of(block), bits);
        write_packed<1>(mask_of_all, block, kBlock, &near);
      }
      Element y_unused[kBlock];
      Element* y = y_of_all ? y_of_all + block * kBlock : y_unused;
      uint8_t* mask = mask_of_all + block * mask_bytes;
      for (int first = 0; first < kBlock; first += kVecs * Key::kCount) {
        const auto& staircase = staircase_at(first);
        Key v[kVecs], levels[kVecs];
        typename Staircase::Found found;
        typename Key::Mask positive[kVecs], inside[kVecs], above[kVecs];
        for (int i = 0; i < kVecs; ++i) {
          if constexpr (Key::kHoldsBlock) v[i] = held[first / Key::kCount + i];
          else v[i] = Key::load(x + first + i * Key::kCount);
        }
        staircase.template apply<kCodes>(v, levels, found, positive);
        for (int i = 0; i < kVecs; ++i) {
          const int at = first + i * Key::kCount;
          if (stream) Key::stream(y + at, levels[i]);
          else Key::store(y + at, levels[i]);
          above[i] = Key::greater(v[i], staircase.top(i));
          inside[i] = Key::at_most(positive[i], v[i], staircase.top(i));
        }
        if (all_states) Key::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::inside) [[likely]] Key::store_bits(mask + first / 8, inside);
        else if (kind == MaskKind::state) Key::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::positive) Key::store_bits(mask + first / 8, positive);
        if constexpr (kCodes) Staircase::store_codes(codes_of_all + block * code_bytes, first, bits, found);
      }
    }
  };
  const float q = static_cast<float>((1 << a.bits) - 1);
  if constexpr (kOneAlpha) {
    const Staircase staircase(static_cast<const float*>(a.alphas.values)[source.channel], q);
    if constexpr (requires { staircase.exact; }) {
      if (!staircase.exact) return false;
    }
    const auto same = [&](int) -> const Staircase& { return staircase; };
    const auto run_known = [&](auto all_states) {
      if (stream) run(same, all_states, std::true_type{});
      else run(same, all_states, std::false_type{});
    };
    if constexpr (!Staircase::kFewInstructions) run(same, std::false_type{}, stream);
    else if constexpr (kCodes) run_known(std::false_type{});  // states together with codes are rare
    else if (kind == MaskKind::state) run_known(std::true_type{});
    else run_known(std::false_type{});
  } else if constexpr (std::is_same_v<Source, AlphaPerColumn<float>>) {
    constexpr int64_t kWidth = kVecs * Key::kCount;
    std::vector<Staircase> staircases;
    for (int64_t i = 0; i < source.channels; i += kWidth) {
      staircases.emplace_back(source.alpha + i, source.inverse + i, q);
    }
    size_t next = first * kBlock / kWidth % staircases.size();
    const auto in_turn = [&](int) -> const Staircase& {
      const Staircase& staircase = staircases[next];
      if (++next == staircases.size()) next = 0;
      return staircase;
    };
    run(in_turn, std::false_type{}, stream);
  } else {
    const auto own = [&](int first) { return Staircase(source.alpha + first, source.inverse + first, q); };
    run(own, std::false_type{}, stream);
  }
  if (whole < last) forward_range<T, Staircase::kRounding, true, kCodes>(args, whole, last, source.of(whole));
  return true;
}

// Builds all staircases once if each alpha recurs often and always in the same place of a group of vectors. Returns
// whether it ran.
template <class T, Rounding R, bool kCodes, int kBits = 1>
bool forward_columns(const Forward& a, int64_t begin, int64_t end) {
  using Key = CompareKey<T>;
  if constexpr (!Key::kArithmetic) {
    return false;
  } else {
    const Alphas& alphas = a.alphas;
    const bool often = (end - begin) * kBlock >= 2 * alphas.channels;
    if (alphas.inner != 1 || alphas.channels % (Key::kGroup * Key::kCount) != 0 || !often) return false;
    const AlphaPerColumn<float> source{static_cast<const float*>(alphas.values),
                                       static_cast<const float*>(alphas.inverses), alphas.channels};
    if constexpr (kBits <= Key::kCompareBits) {
      if (a.bits != kBits) return forward_columns<T, R, kCodes, kBits + 1>(a, begin, end);
      forward_staircase<T, kCodes, CompareStaircase<T, R, kBits, false>>(a, begin, end, source);
    } else {
      forward_staircase<T, kCodes, ArithmeticStaircase<T, R, false>>(a, begin, end, source);
    }
    return true;
  }
}

// Building a table takes about as long as it saves in one block per level.
template <class T, Rounding R, bool kCodes, int kBits = 1, class Source>
void forward_regular(const Forward& a, int64_t first, int64_t last, const Source& source) {
  using Key = CompareKey<T>;
  constexpr bool kOneAlpha = std::is_same_v<Source, OneAlpha<compute_t<T>>>;
  if constexpr (kBits <= Key::kSearchBits && (kOneAlpha || kBits <= Key::kCompareBits)) {
    if (a.bits != kBits) return forward_regular<T, R, kCodes, kBits + 1>(a, first, last, source);
    if constexpr (kBits <= Key::kCompareBits) {
      forward_staircase<T, kCodes, CompareStaircase<T, R, kBits, kOneAlpha>>(a, first, last, source);
      return;
    } else {
      if (last - first >= 1 << kBits) {
        forward_staircase<T, kCodes, SearchStaircase<T, R, kBits>>(a, first, last, source);
        return;
      }
    }
  }
  if constexpr (Key::kArithmetic)
    forward_staircase<T, kCodes, ArithmeticStaircase<T, R, kOneAlpha>>(a, first, last, source);
  else forward_range<T, R, true, kCodes>(a, first, last, source);
}

// Arithmetic that is exact for most alphas, which takes as long to find out as a block for every fourth level. Not
// inlined: its tables would be in the frame of every forward. Returns whether it ran.
template <class T, Rounding R, bool kCodes, class Source>
__attribute__((noinline)) bool forward_fast(const Forward& a, int64_t first, int64_t last, const Source& source) {
  using Key = CompareKey<T>;
  if constexpr (kHasHalves<Key> && std::is_same_v<Source, OneAlpha<compute_t<T>>>) {
    if (last - first < 1 << a.bits >> 2) return false;
    if constexpr (R == Rounding::ceil) {
      return a.bits >= Key::kHalvesBits &&
             forward_staircase<T, kCodes, HalfwayStaircase<T, kCodes>>(a, first, last, source);
    } else if constexpr (std::is_same_v<T, bf16>) {
      return a.bits > Key::kSearchBits &&
             forward_staircase<T, kCodes, ArithmeticStaircase<T, R, true, true>>(a, first, last, source);
    }
  }
  return false;
}

template <class T, Rounding R, bool kRegular, bool kCodes>
void forward_best(const Forward& a, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  if constexpr (kRegular) {
    if (forward_columns<T, R, kCodes>(a, begin, end)) return;
  }
  for_each_range<A>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
    if constexpr (kRegular) {
      if (!forward_fast<T, R, kCodes>(a, first, last, source)) forward_regular<T, R, kCodes>(a, first, last, source);
    } else {
      forward_range<T, R, false, kCodes>(a, first, last, source);
    }
  });
}

void forward(const Forward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    with_rounding(a.rounding, [&](auto rounding) {
      with_regular(a.alphas, [&](auto regular) {
        with_flag(a.codes, [&](auto codes) {
          using T = typename decltype(dtype)::type;
          forward_best<T, rounding.value, regular.value, codes.value>(a, begin, end);
        });
      });
    });
  });
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
