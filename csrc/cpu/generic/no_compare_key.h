// For types whose compare keys are no faster than their numbers.
#pragma once

namespace cg {

struct NoCompareKey {
  static constexpr int kSearchBits = 0, kCompareBits = 0;
  static constexpr bool kArithmetic = false;
};

template <class Key>
constexpr bool kHasHalves = requires { typename Key::Halves; };

}  // namespace cg
