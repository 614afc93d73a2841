// Three fast staircases on compare keys, for x that are not NaN.
#pragma once

#include <algorithm>
#include <iterator>

#include "instruction_set.h"

namespace cg::CG_ISA {
namespace {

// A comparison with each threshold: the fastest if there are few and a comparison costs no more than a look-up. For one
// alpha per group of vectors, or per element.
template <class T, Rounding R, int kBits, bool kOneAlpha = true>
struct CompareStaircase {
  using Key = CompareKey<T>;
  using F = decltype(Key().floats());
  static constexpr int kTop = (1 << kBits) - 1, kVecs = Key::kGroup, kStairs = kOneAlpha ? 1 : kVecs;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = true;
  using Found = typename Key::Mask[kBits][kVecs];  // the bits of the codes
  Key thresholds[kStairs][kTop], levels[kStairs][kTop];  // of codes 1 to kTop

  CG_HD CompareStaircase(float alpha, float) { make(F(alpha), 0); }
  CG_HD CompareStaircase(const float* alpha, const float*, float) {
    for (int i = 0; i < kVecs; ++i) make(Key::load_floats(alpha + i * Key::kCount), i);
  }
  CG_HD Key top(int i) const { return levels[kOneAlpha ? 0 : i][kTop - 1]; }

  // The levels of a group of x, its codes if kCodes, and where x > 0.
  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    for (int i = 0; i < kVecs; ++i) {
      const auto& threshold = thresholds[kOneAlpha ? 0 : i];
      const auto& level = levels[kOneAlpha ? 0 : i];
      typename Key::Mask greater[kTop];
      for (int k = 0; k < kTop; ++k) {
        greater[k] = Key::greater(x[i], threshold[k]);
        y[i] = k == 0 ? Key::masked(greater[k], level[k]) : Key::select(greater[k], level[k], y[i]);
      }
      positive[i] =
          R == Rounding::nearest ? Key::greater(x[i], Key::all(0)) : greater[0];  // else the first threshold is 0
      if constexpr (kCodes) {
        found[kBits - 1][i] = greater[kTop / 2];
        if constexpr (kBits == 2) found[0][i] = Key::choose(greater[1], greater[2], greater[0]);  // each in the next
      }
    }
  }
  // To a block's packed codes, from element `first` on.
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    if constexpr (kBits == 1) Key::store_bits(block + first / 8, found[0]);
    else Key::store_states(block + first / 4, found[0], found[1]);
  }

 private:
  CG_HD void make(F alpha, int i) {
    for (int k = 1; k <= kTop; ++k) {
      Key& level = levels[i][k - 1];
      Key& threshold = thresholds[i][k - 1];
      level = Key::level(mul(F(float(k)), alpha));
      if (k == 1 && R != Rounding::nearest) {
        threshold = Key::all(0);
      } else {
        const Key below = k == 1 ? Key::all(0) : levels[i][k - 2];
        threshold = R == Rounding::ceil ? below : Key::floor(mul(below.floats() + level.floats(), F(0.5f)));
      }
    }
  }
};

// A binary search in register-sized tables, for widths at which it beats arithmetic. Each of kBits comparisons halves
// the codes that are left. The next threshold, and the final level, are looked up by the earlier outcomes: bit d of an
// index is comparison d.
template <class T, Rounding R, int kBits>
struct SearchStaircase {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  using Index = typename Key::Index;
  static constexpr int kVecs = kBlock / Key::kCount;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = Index[kVecs];
  static constexpr int registers(int comparison) {
    return 1 << comparison <= Key::kEntries ? 1 : (1 << comparison) / Key::kEntries;
  }
  static constexpr int kTop = (1 << kBits) - 1, kLast = kBits - 1, kRegisters = registers(kLast);
  Key thresholds[kBits][kRegisters], codes[kRegisters], below[kRegisters], above[kRegisters], highest;

  // For each outcome of the comparisons before this one, the entry of the lowest code left.
  static CG_HD void fill(Key* to, int comparison, const Element* of_code) {
    Element entries[kRegisters * Key::kCount];
    const int count = registers(comparison) * Key::kCount;
    for (int i = 0; i < count; ++i) {
      const int outcome = i / Key::kCount * Key::kEntries + i % Key::kEntries;
      int code = 0;
      for (int d = 0; d < comparison; ++d) code |= (outcome >> d & 1) << (kLast - d);
      entries[i] = of_code[code];
    }
    for (int i = 0; i < registers(comparison); ++i) to[i] = Key::load(entries + i * Key::kCount);
  }

  CG_HD SearchStaircase(float alpha, float) {
    Element all_codes[kTop + 1], all_thresholds[kTop + 1], all_levels[kTop + 1];
    for (int k = 0; k <= kTop; ++k) {
      all_codes[k] = static_cast<Element>(k);
      all_thresholds[k] = compare_key_floor<T>(threshold<T, R>(float(k), alpha));
      all_levels[k] = compare_key_floor<T>(level<T>(float(k), alpha));
    }
    for (int d = 0; d < kBits; ++d) fill(thresholds[d], d, all_thresholds + (1 << (kLast - d)));
    fill(codes, kLast, all_codes);
    fill(below, kLast, all_levels);
    fill(above, kLast, all_levels + 1);
    highest = Key::all(all_levels[kTop]);
  }
  CG_HD Key top(int) const { return highest; }

  // All vectors of a block side by side, as each comparison waits for the one before it.
  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    Index index[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      index[i] = Key::indices(Key::kIndexStart);
      positive[i] = Key::greater(x[i], Key::all(0));
    }
    search<kCodes>(x, index, found, y);
  }
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    constexpr int kWidth = packed_width(kBits);
    Key::template store_codes<kWidth>(block + first * kWidth / 8, found);
  }

 private:
  template <bool kCodes, int kComparison = 0>
  CG_HD void search(const Key (&x)[kVecs], Index (&index)[kVecs], Found& found, Key (&levels)[kVecs]) const {
    constexpr int kCount = registers(kComparison);
    Key at[kVecs];
    typename Key::Mask greater[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (kComparison == 0) at[i] = thresholds[0][0];  // the same for all
      else at[i] = Key::template look_up<kCount>(thresholds[kComparison], index[i]);
      greater[i] = Key::greater(x[i], at[i]);
    }
    if constexpr (kComparison < kLast) {
      for (int i = 0; i < kVecs; ++i) index[i] = Key::raise(index[i], greater[i], Key::kIndexUnit << kComparison);
      search<kCodes, kComparison + 1>(x, index, found, levels);
    } else {
      for (int i = 0; i < kVecs; ++i) {  // under ceil a threshold is the level below
        const Key low = R == Rounding::ceil ? at[i] : Key::template look_up<kCount>(below, index[i]);
        levels[i] = Key::select(greater[i], Key::template look_up<kCount>(above, index[i]), low);
        if constexpr (kCodes)
          found[i] = Key::raise(Key::whole(Key::template look_up<kCount>(codes, index[i])), greater[i], 1);
      }
    }
  }
};

// Arithmetic, for widths at which a search takes longer; for one alpha, or one per element. In 16 bits floor(x / alpha)
// is the code or one less, and the threshold above it decides: rounding moves a level by at most half the spacing u of
// T, u < 2 alpha for regular alphas, x and the levels are numbers of T, and the error of x / alpha is far below u /
// alpha.
template <class T, Rounding R, bool kOneAlpha = true, bool kTiesUp = false>
struct ArithmeticStaircase {
  using Key = CompareKey<T>;
  using F = decltype(Key().floats());
  static constexpr int kVecs = Key::kGroup, kStairs = kOneAlpha ? 1 : kVecs;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = typename Key::Index[kVecs];
  F alpha[kStairs], inverse[kStairs], q;
  Key highest[kStairs];
  bool exact = true;

  CG_HD ArithmeticStaircase(float step, float top) : q(top) {
    make(F(step), F(reciprocal(step, R)), 0);
    if constexpr (kTiesUp) {
      typename Key::Mask wrong = Key::greater(Key::all(0), Key::all(0));
      float numbers[Key::kCount];
      for (int i = 0; i < Key::kCount; ++i) numbers[i] = static_cast<float>(i);
      F k = Key::load_floats(numbers);
      for (float begin = 0; begin <= top; begin += Key::kCount) {
        const F level = mul(min_of(k, q), alpha[0]);
        wrong = wrong | Key::differ(Key::rounded(level), Key::level(level));
        k = k + F(float(Key::kCount));
      }
      exact = !Key::any_above(Key::masked(wrong, Key::all(1)), 0);
    }
  }
  CG_HD ArithmeticStaircase(const float* alphas, const float* inverses, float top) : q(top) {
    for (int i = 0; i < kVecs; ++i) {
      const int at = i * Key::kCount;
      make(Key::load_floats(alphas + at), Key::load_floats(inverses + at), i);
    }
  }
  CG_HD Key top(int i) const { return highest[kOneAlpha ? 0 : i]; }

  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    for (int i = 0; i < kVecs; ++i) {
      const F step = alpha[kOneAlpha ? 0 : i], factor = inverse[kOneAlpha ? 0 : i];
      positive[i] = Key::greater(x[i], Key::all(0));
      if constexpr (sizeof(T) == sizeof(float)) {
        const Quantized<F> number = quantize_number<T, R>(x[i].floats(), step, factor, q);
        y[i] = Key::level(number.y);
        if constexpr (kCodes) found[i] = Key::whole(number.code);
      } else {
        // Of the last levels several may be equal: only x shows which of their codes it has.
        const Key in_range = kCodes ? Key::masked(positive[i], x[i]) : Key::clamp(x[i], Key::all(0), top(i));
        const F u = mul(in_range.floats(), factor), code = floor(kCodes ? min_of(u, q - F(1.0f)) : u);
        const Key low = rounded(mul(code, step)), high = rounded(mul_add(code, step, step));
        typename Key::Mask greater;
        if constexpr (R == Rounding::ceil) {
          greater = Key::greater(in_range, low);
        } else {
          F middle = mul(low.floats() + high.floats(), F(0.5f));
          if constexpr (R == Rounding::hwgq) middle = select(code > F(0.0f), middle, F(0.0f));
          greater = Key::mask(in_range.floats() > middle);
        }
        y[i] = Key::select(greater, high, low);
        if constexpr (kCodes) found[i] = Key::raise(Key::whole(code), greater, 1);
      }
    }
  }
  static CG_HD void store_codes(uint8_t* block, int first, int bits, const Found& found) {
    if (packed_width(bits) == 4) Key::template store_codes<4>(block + first / 2, found);
    else Key::template store_codes<8>(block + first, found);
  }

 private:
  CG_HD Key rounded(F level) const {
    if constexpr (kTiesUp) return Key::rounded(level);
    else return Key::level(level);
  }
  CG_HD void make(F step, F factor, int i) {
    alpha[i] = step;
    inverse[i] = factor;
    highest[i] = Key::level(mul(q, step));
  }
};

// Arithmetic in half the instructions, for 16 bits, ceil and one alpha; but not exact for every alpha. x is above L[k],
// k alpha rounded, if the number halfway from x down to its neighbour is above k alpha: so the code is a quotient
// rounded up. Ties, and k alpha next to such a number, are left to ArithmeticStaircase.
template <class T, bool kCodes>
struct HalfwayStaircase {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  using F = decltype(Key().floats());
  static constexpr int kVecs = Key::kGroup, kGroup = kVecs * Key::kCount, kMost = 256;
  static constexpr Rounding kRounding = Rounding::ceil;
  static constexpr bool kFewInstructions = false;
  using Found = typename Key::Index[kVecs];
  F alpha, inverse;
  Key first, last, highest;  // the levels 1, q and q; of the first two, the number below
  typename Key::Halves halves;
  bool exact;

  HalfwayStaircase(float step, float q) : alpha(step) {
    const int top = static_cast<int>(q);
    Element levels[kMost + kGroup + 1];
    float numbers[kGroup];
    for (int k = 0; k <= top; k += Key::kCount) {
      for (int i = 0; i < Key::kCount; ++i) numbers[i] = static_cast<float>(k + i);
      Key::store(levels + k, Key::level(mul(Key::load_floats(numbers), alpha)));
    }
    std::fill(levels + top + 1, std::end(levels), levels[top]);
    first = Key::all(levels[1] - 1), last = Key::all(levels[top] - 1), highest = Key::all(levels[top]);
    exact = !kCodes || levels[top - 1] < levels[top];
    if (!exact) return;
    const uint32_t reciprocal = bit_cast<uint32_t>(1 / step);
    for (const uint32_t near : {reciprocal, reciprocal - 1, reciprocal + 1}) {
      inverse = F(bit_cast<float>(near));
      exact = matches(levels, top);
      if (exact) break;
    }
  }
  CG_HD Key top(int) const { return highest; }

  template <bool>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    for (int i = 0; i < kVecs; ++i) {
      positive[i] = Key::greater(x[i], Key::all(0));
      const F code = ceil(mul(halves.halfway_down(x[i], first, last), inverse));
      y[i] = Key::masked(positive[i], halves.rounded(mul(code, alpha)));
      if constexpr (kCodes) found[i] = Key::masked(positive[i], Key::whole(code));
    }
  }
  static CG_HD void store_codes(uint8_t* block, int first, int bits, const Found& found) {
    ArithmeticStaircase<T, kRounding>::store_codes(block, first, bits, found);
  }

 private:
  // Code and level rise with x: they are right if they are at each level, and at the number above it.
  bool matches(const Element* levels, int top) const {
    Element number[kGroup];
    for (int i = 0; i < kGroup; ++i) number[i] = static_cast<Element>(i);
    typename Key::Mask wrong = Key::greater(Key::all(0), Key::all(0));
    for (int k = 1; k <= top; k += kGroup) {
      for (const int above : {0, 1}) {
        Key x[kVecs], y[kVecs];
        Found found;
        typename Key::Mask positive[kVecs];
        const auto load = [&](int i, int from) { return Key::load(levels + k + i * Key::kCount + from); };
        for (int i = 0; i < kVecs; ++i) x[i] = load(i, 0).plus(above);
        apply<kCodes>(x, y, found, positive);
        for (int i = 0; i < kVecs; ++i) {
          const typename Key::Mask first_of = Key::greater(load(i, above), load(i, above - 1));  // of equal levels
          wrong = wrong | (first_of & Key::differ(y[i], load(i, above)));
          if constexpr (kCodes) {
            const Key wanted = Key::load(number + i * Key::kCount).plus(k + above);
            wrong = wrong | (first_of & Key::differ(Key::of(found[i]), wanted));
          }
        }
      }
    }
    return !Key::any_above(Key::masked(wrong, Key::all(1)), 0);
  }
};

}  // namespace
}  // namespace cg::CG_ISA
