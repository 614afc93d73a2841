// The arithmetic of the scale of quantized weights (docs/spec.md, section 7): what a kernel does with exact sums of
// integers, and the integers.
#pragma once

#include "signed.h"

namespace cg {

// v * 2^exponent, rounded once; exact where the result is. By two factors, as one may be out of range.
template <class A>
struct PowerOfTwo {
  A first, second;
  CG_HD explicit PowerOfTwo(int exponent) : first(of(exponent >> 1)), second(of(exponent - (exponent >> 1))) {}
  static CG_HD A of(int exponent) {
    return static_cast<A>(bit_cast<double>(static_cast<uint64_t>(exponent + 1023) << 52));
  }
  CG_HD A times(A v) const { return mul(mul(v, first), second); }
};

// Magnitudes are integers below 2^31: floor(|w| * 2^magnitude_shift(max |w|)).
constexpr int kMagnitudeBits = 31;
template <class A>
CG_HD int magnitude_shift(A largest) {
  int exponent = 0;
  ::frexp(static_cast<double>(largest), &exponent);
  return kMagnitudeBits - exponent;
}
template <class A>
CG_HD int32_t magnitude(A w, PowerOfTwo<A> power) {
  return static_cast<int32_t>(power.times(w < A(0) ? -w : w));
}

// A scale in units of magnitudes: the quotient of two exact sums.
struct Quotient {
  int64_t product, square;
  CG_HD double explained() const {
    const double p = static_cast<double>(product);
    return mul(p, p) / static_cast<double>(square);
  }
};
template <class A>
CG_HD A weight_scale(Quotient q, int shift) {
  return static_cast<A>(
      PowerOfTwo<double>(-shift).times(static_cast<double>(q.product) / static_cast<double>(q.square)));
}

// Two bits: the magnitudes from half_mean on are those of the codes nearest to the mean, sum / count.
CG_HD int32_t half_mean(Quotient q) { return static_cast<int32_t>((q.product + 2 * q.square - 1) / (2 * q.square)); }

// Four and eight bits: the scales that are tried, as divisors of the largest magnitude in units of 2^-unit.
struct WeightGrid {
  int top, unit, shift, count;
  uint16_t divisors[96];

  constexpr CG_HD void add(int divisor) { divisors[count++] = static_cast<uint16_t>(divisor); }
};
constexpr CG_HD WeightGrid weight_grid(int bits) {
  WeightGrid grid{signed_top(bits), bits == 4 ? 2 : 0, bits == 4 ? 24 : 20, 0, {}};
  if (bits == 4) grid.add(4), grid.add(8);
  const int first = bits == 4 ? 12 : 96, last = bits == 4 ? 56 : 152, end = bits == 4 ? 256 : 1024;
  for (int i = first; i <= last; ++i) grid.add(i);
  for (int i = last + last / 12; i < end; i += i / 12) grid.add(i);
  return grid;
}
// largest / divisor as what `search_code` multiplies by: below 2^16 - 2^10.
CG_HD int32_t search_inverse(const WeightGrid& grid, int divisor, int32_t largest) {
  return static_cast<int32_t>((static_cast<int64_t>(divisor) << (16 + grid.shift - grid.unit)) / largest);
}
// The upper 15 bits of a magnitude are enough for a code.
CG_HD int32_t short_magnitude(int32_t m) { return m >> 16; }
CG_HD int32_t search_code(int32_t short_m, int32_t inverse, const WeightGrid& grid) {
  const int32_t code = (short_m * inverse + (1 << (grid.shift - 1))) >> grid.shift;
  return code < grid.top ? code : grid.top;
}

}  // namespace cg
