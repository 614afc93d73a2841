// Three fast staircases on compare keys, for x that are not NaN.
#pragma once

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
        if constexpr (kBits == 2) found[0][i] = Key::choose(greater[1], greater[2], greater[0]);
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
      at[i] = Key::template look_up<kCount>(thresholds[kComparison], index[i]);
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
template <class T, Rounding R, bool kOneAlpha = true>
struct ArithmeticStaircase {
  using Key = CompareKey<T>;
  using F = decltype(Key().floats());
  static constexpr int kVecs = Key::kGroup, kStairs = kOneAlpha ? 1 : kVecs;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = typename Key::Index[kVecs];
  F alpha[kStairs], inverse[kStairs], q;
  Key highest[kStairs];

  CG_HD ArithmeticStaircase(float step, float top) : q(top) { make(F(step), F(reciprocal(step, R)), 0); }
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
        if constexpr (kCodes) found[i] = number.code;
      } else {
        const Key from_zero = Key::masked(positive[i], x[i]);
        const F code = floor(min_of(mul(from_zero.floats(), factor), q - F(1.0f)));
        const Key low = Key::level(mul(code, step)), high = Key::level(mul(code + F(1.0f), step));
        typename Key::Mask greater;
        if constexpr (R == Rounding::ceil) {
          greater = Key::greater(from_zero, low);
        } else {
          F middle = mul(low.floats() + high.floats(), F(0.5f));
          if constexpr (R == Rounding::hwgq) middle = select(code > F(0.0f), middle, F(0.0f));
          greater = Key::mask(from_zero.floats() > middle);
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
  CG_HD void make(F step, F factor, int i) {
    alpha[i] = step;
    inverse[i] = factor;
    highest[i] = Key::level(mul(q, step));
  }
};

}  // namespace
}  // namespace cg::CG_ISA
