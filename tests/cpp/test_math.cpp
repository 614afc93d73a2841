// The header maths at points worked by hand. The loops around it are tested from Python, against the oracle.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu/generic/fast_slope.h"
#include "math/alpha_grad.h"
#include "math/bits.h"
#include "math/signed.h"

namespace {

using namespace cg;

int failures = 0;

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool condition, const char* text, int line) {
  if (condition) return;
  std::printf("%s:%d: not so: %s\n", __FILE__, line, text);
  ++failures;
}

#define CHECK_NEAR(got, wanted, ulps) check_near(got, wanted, ulps, #got, __LINE__)
template <class A, class Exact>
void check_near(A got, Exact wanted, int ulps, const char* text, int line) {
  const A rounded = static_cast<A>(wanted);
  const Exact ulp = std::nextafter(rounded, std::numeric_limits<A>::infinity()) - rounded;
  if (std::fabs(got - wanted) <= ulps * ulp) return;
  std::printf("%s:%d: %s = %.17g, wanted %.17g\n", __FILE__, line, text, double(got), double(wanted));
  ++failures;
}

template <class A>
constexpr A kInf = std::numeric_limits<A>::infinity();
template <class A>
constexpr A kNan = std::numeric_limits<A>::quiet_NaN();

// The next number of T above v > 0.
template <class T>
compute_t<T> after(compute_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) return to_float(bf16{static_cast<uint16_t>(to_bf16(v).bits + 1)});
  else if constexpr (std::is_same_v<T, f16>) return to_float(f16{static_cast<uint16_t>(to_f16(v).bits + 1)});
  else return std::nextafter(v, kInf<T>);
}

// And the one below.
template <class T>
compute_t<T> before(compute_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) return to_float(bf16{static_cast<uint16_t>(to_bf16(v).bits - 1)});
  else if constexpr (std::is_same_v<T, f16>) return to_float(f16{static_cast<uint16_t>(to_f16(v).bits - 1)});
  else return std::nextafter(v, T(0));
}

template <class T>
constexpr compute_t<T> kSmallest = std::numeric_limits<T>::denorm_min();
template <>
constexpr float kSmallest<bf16> = 0x1p-133f;
template <>
constexpr float kSmallest<f16> = 0x1p-24f;

// Both ways to the code must give `code`, and L[code].
template <class T, Rounding R>
void check_code(compute_t<T> x, compute_t<T> alpha, int bits, int code) {
  using A = compute_t<T>;
  const A q = A((1 << bits) - 1);
  const Quantized<A> fast = quantize<T, R>(x, alpha, reciprocal(alpha, R), q), any = quantize_any<T, R>(x, alpha, q);
  for (const Quantized<A>& got : {fast, any}) {
    if (got.code == A(code) && got.y == level<T>(A(code), alpha) && !std::signbit(got.y)) continue;
    std::printf("rounding %d, %zu bytes: x = %a has code %d, got %g and y = %a\n", int(R), sizeof(T), double(x), code,
                double(got.code), double(got.y));
    ++failures;
  }
}

// Two bits, alpha = 1/2: levels 0, 1/2, 1, 3/2. At a threshold the lower code wins, one step above it the higher.
template <class T>
void test_codes() {
  using A = compute_t<T>;
  const A half = A(0.5);
  const auto at_thresholds = [&]<Rounding R>(A first, A second, A third) {
    int code = 0;
    for (const A threshold : {first, second, third}) {
      check_code<T, R>(threshold, half, 2, code);
      check_code<T, R>(threshold > 0 ? after<T>(threshold) : kSmallest<T>, half, 2, ++code);
    }
    for (const A below : {A(-0.0), -kSmallest<T>, A(-3), -kInf<A>}) check_code<T, R>(below, half, 2, 0);
    for (const A above : {A(2), A(1000), kInf<A>}) check_code<T, R>(above, half, 2, 3);
    const Quantized<A> of_nan = quantize<T, R>(kNan<A>, half, reciprocal(half, R), A(3));
    CHECK(of_nan.code == 3 && std::isnan(of_nan.y));
    const Quantized<A> any_of_nan = quantize_any<T, R>(kNan<A>, half, A(3));
    CHECK(any_of_nan.code == 3 && std::isnan(any_of_nan.y));
    // A level is its own image, whatever it was rounded to, and under ceil the next number has the next code. With 6
    // bits the levels are distinct in every type.
    for (const float step : {0.1f, 0.3f, 0.6f, 0.7f, 1.1f}) {
      const A alpha = step;
      for (int code = 0; code < 63; ++code) {
        const A on_level = level<T>(A(code), alpha);
        check_code<T, R>(on_level, alpha, 6, code);
        if (R == Rounding::ceil) check_code<T, R>(code ? after<T>(on_level) : kSmallest<T>, alpha, 6, code + 1);
      }
    }
  };
  at_thresholds.template operator()<Rounding::ceil>(A(0), A(0.5), A(1));
  at_thresholds.template operator()<Rounding::nearest>(A(0.25), A(0.75), A(1.25));
  at_thresholds.template operator()<Rounding::hwgq>(A(0), A(0.75), A(1.25));
}

void test_levels() {
  // 3 * 0.1f is 1.2 * 2^-2; the nearest of 7 bits after the point is 154/128, of 10 bits 1229/1024.
  CHECK((level<bf16>(3.0f, 0.1f)) == 154.0f / 128 / 4);
  CHECK((level<f16>(3.0f, 0.1f)) == 1229.0f / 1024 / 4);
  CHECK((level<float>(3.0f, 0.1f)) == 3 * 0.1f);
  CHECK((regular<float>(0.1f, 255.0f)));
  CHECK((!regular<float>(0x1p-140f, 3.0f)));
  CHECK((!regular<f16>(1e4f, 15.0f)));
  CHECK((!regular<float>(kNan<float>, 3.0f)));
}

// All ways to the code must give p + k, and L[k], which is +0 for k = 0.
template <class T>
void check_signed_code(compute_t<T> x, compute_t<T> alpha, int bits, int k) {
  using A = compute_t<T>;
  const A p = A(signed_top(bits)), inverse = A(1) / alpha;
  const Quantized<A> fast = quantize_signed<T>(x, alpha, inverse, p), any = quantize_signed_any<T>(x, alpha, p);
  const Quantized<A> of_group = std::fabs(x) <= p * alpha ? quantize_signed_of_group<T>(x, alpha, inverse, p) : any;
  for (const Quantized<A>& got : {fast, any, of_group}) {
    if (got.code == p + A(k) && got.y == signed_level<T>(A(k), alpha) && (k != 0 || !std::signbit(got.y))) continue;
    std::printf("%zu bytes: x = %a has level %d, got code %g and y = %a\n", sizeof(T), double(x), k, double(got.code),
                double(got.y));
    ++failures;
  }
}

// Three bits, alpha = 1/2: levels -3/2 to 3/2. At a threshold the lower code wins, on both sides of 0.
template <class T>
void test_signed_codes() {
  using A = compute_t<T>;
  const A half = A(0.5);
  for (int k = -2; k <= 3; ++k) {
    const A threshold = (A(k) - half) * half;
    const A above = threshold > 0 ? after<T>(threshold) : -before<T>(-threshold);
    const A below = threshold > 0 ? before<T>(threshold) : -after<T>(-threshold);
    check_signed_code<T>(threshold, half, 3, k - 1);
    check_signed_code<T>(below, half, 3, k - 1);
    check_signed_code<T>(above, half, 3, k);
    check_signed_code<T>(A(k) * half, half, 3, k);
  }
  for (const A zero : {A(0), A(-0.0), kSmallest<T>, -kSmallest<T>}) check_signed_code<T>(zero, half, 3, 0);
  for (const A sign : {A(1), A(-1)}) {
    check_signed_code<T>(sign * A(100), half, 3, sign > 0 ? 3 : -3);
    check_signed_code<T>(sign * kInf<A>, half, 3, sign > 0 ? 3 : -3);
  }
  for (const Quantized<A>& nan :
       {quantize_signed<T>(kNan<A>, half, A(2), A(3)), quantize_signed_any<T>(kNan<A>, half, A(3)),
        quantize_signed_any<T>(A(1), kNan<A>, A(3))}) {
    CHECK(nan.code == A(3) && std::isnan(nan.y));
  }
  const Quantized<A> of_zeros = quantize_signed_any<T>(A(-0.0), A(0), A(3));
  CHECK(of_zeros.code == A(3) && of_zeros.y == 0 && !std::signbit(of_zeros.y));
  CHECK(!signed_outside<T>(A(1.5), half, A(3)) && !signed_outside<T>(A(-1.5), half, A(3)));
  CHECK(signed_outside<T>(after<T>(A(1.5)), half, A(3)) && signed_outside<T>(-after<T>(A(1.5)), half, A(3)));
  CHECK(!signed_outside<T>(kNan<A>, half, A(3)));
}

// All of them, up to powers of two.
template <class T>
void test_levels_of_groups() {
  for (int mantissa = 128; mantissa < 256; ++mantissa) {
    const float alpha = static_cast<float>(mantissa) * 0x1p-13f;
    const LevelsOfGroup<T, float> levels(alpha);
    for (int k = -127; k <= 127; ++k) {
      const float level = levels.at(static_cast<float>(k));
      CHECK(level == signed_level<T>(static_cast<float>(k), alpha) && (k != 0 || !std::signbit(level)));
    }
    CHECK(!std::signbit(levels.at(-0.0f)));
  }
  CHECK(normal_levels<T>(0x1p-14f));
  CHECK(normal_levels<T>(0x1.fep-15f) == (std::is_same_v<T, bf16>));
}

// The quotient, rounded up to 8 significant bits.
template <class A>
void test_signed_alpha() {
  const auto alpha = [](A largest, A p) { return to_float(signed_alpha(largest, p)); };
  CHECK(alpha(A(7), A(7)) == 1);
  CHECK(alpha(A(21), A(7)) == 3);
  CHECK(alpha(A(1), A(1)) == 1 && alpha(std::nextafter(A(1), A(2)), A(1)) == 1 + 0x1p-7f);
  CHECK(alpha(A(1), A(3)) == 0x1.56p-2f);  // 1/3 is 0x1.5555...p-2
  CHECK(alpha(std::nextafter(A(2), A(3)), A(1)) == 2 + 0x1p-6f);
  CHECK(alpha(A(0x1.fffp0), A(1)) == 2);  // a carry into the exponent
  CHECK(alpha(A(0), A(7)) == 0 && signed_alpha(A(0), A(7)).bits == 0);
  CHECK(alpha(A(0x1p-149), A(1)) == 0x1p-133f);  // bfloat16's smallest
  CHECK(alpha(A(0x1p-130), A(1)) == 0x1p-130f);
  CHECK(alpha(A(0x1.fep127), A(1)) == 0x1.fep127f);  // its largest, and what exceeds it
  for (const A largest : {A(0x1.ffp127), kInf<A>, kNan<A>, -kNan<A>}) CHECK(signed_alpha(largest, A(1)).bits == 0x7fc0);
}

void test_signed_alpha_of_doubles() {
  // The rounding to float must not be down.
  CHECK(to_float(signed_alpha(1 + 0x1p-40, 1.0)) == 1 + 0x1p-7f);
  CHECK(to_float(signed_alpha(0x1p-1000, 1.0)) == 0x1p-133f);
  CHECK(signed_alpha(0x1p1000, 1.0).bits == 0x7fc0);
  CHECK(to_float(signed_alpha(0x1.fep128, 2.0)) == 0x1.fep127f);
}

void test_half_precision() {
  CHECK(to_bf16(1 + 0x1p-8f).bits == 0x3f80);   // halfway: to the even neighbour, here down
  CHECK(to_bf16(1 + 0x3p-8f).bits == 0x3f82);   // and here up
  CHECK(to_bf16(0x1.fffffep127f).bits == 0x7f80);
  CHECK(to_f16(1 + 0x1p-11f).bits == 0x3c00);
  CHECK(to_f16(1 + 0x3p-11f).bits == 0x3c02);
  CHECK(to_f16(65519.0f).bits == 0x7bff);
  CHECK(to_f16(65520.0f).bits == 0x7c00);
  CHECK(to_f16(0x1p-25f).bits == 0x0000);
  CHECK(to_f16(0x1.8p-25f).bits == 0x0001);
  CHECK(to_f16(-0x1p-24f).bits == 0x8001);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = to_float(bf16{uint16_t(bits)}), narrow = to_float(f16{uint16_t(bits)});
    CHECK(std::isnan(wide) ? std::isnan(to_float(to_bf16(wide))) : to_bf16(wide).bits == bits);
    CHECK(std::isnan(narrow) ? std::isnan(to_float(to_f16(narrow))) : to_f16(narrow).bits == bits);
  }
}

// alpha = 2, two bits: q = 3, top = 6.
template <class A>
Point<A> at(A x) {
  return {x, A(2), x / A(2), A(3), A(1) / A(3), A(6)};
}
template <class Ste, class A>
A slope(A x) {
  return slope<Ste>(at(x));
}
template <class Ste, class A>
A chain(A x, A code) {
  return chain_value(at(x), code, slope<Ste>(x));
}

// Up to where it may be asked for, 2^-12 of the slope that float64 has.
template <class Ste>
void test_fast_slope() {
  for (const float alpha : {0x1p-100f, 0.3f, 7.0f, 0x1p100f}) {
    for (const int bits : {1, 2, 8}) {
      const float q = static_cast<float>((1 << bits) - 1);
      using Slope = FastSlope<Ste, bf16, float>;
      const float most = std::min(Slope::most(alpha, q), std::numeric_limits<float>::max());
      const Slope fast(alpha, q);
      for (float x = alpha * 0x1p-20f; x <= most; x *= 1.001f) {
        const double u = double(x) / alpha;
        const double wanted = slope<Ste>(Point<double>{x, alpha, u, q, 1.0 / q, double(q) * alpha});
        CHECK(std::fabs(fast.at(x) - wanted) <= 0x1p-12 * wanted);
      }
      CHECK(most > 60 * q * alpha && fast.at(most) > 0);
    }
  }
}

template <class A>
void test_stes() {
  const A above = std::nextafter(A(6), A(7)), tiny = std::numeric_limits<A>::denorm_min();
  for (const A x : {A(-1), A(0), A(1), A(7)}) CHECK(slope<Identity>(x) == 1);
  for (const A x : {-kInf<A>, A(-1), A(-0.0), A(0)}) {
    CHECK(slope<Relu>(x) == 0);
    CHECK(slope<ClippedRelu>(x) == 0);
    CHECK(slope<LogTailedRelu>(x) == 0);
    CHECK(slope<ReverseExponential>(x) == 0);
  }
  for (const A x : {tiny, A(1), A(6)}) {
    CHECK(slope<Relu>(x) == 1);
    CHECK(slope<ClippedRelu>(x) == 1);
    CHECK(slope<LogTailedRelu>(x) == 1);
  }
  CHECK(slope<Relu>(above) == 1);
  CHECK(slope<ClippedRelu>(above) == 0);
  for (const A x : {A(-1), A(0), A(6), A(7)}) CHECK(slope<Trust>(x) == 1);
  for (const A x : {-kInf<A>, std::nextafter(A(-1), A(-2)), std::nextafter(A(7), A(8)), kInf<A>})
    CHECK(slope<Trust>(x) == 0);
  CHECK(slope<LogTailedRelu>(A(8)) == A(0.5));   // u = 4: 1 / (4 - 3 + 1)
  CHECK(slope<LogTailedRelu>(A(20)) == A(0.125));  // u = 10: 1 / (10 - 3 + 1)
  CHECK(slope<ReverseExponential>(tiny) == 1);
  CHECK_NEAR(slope<ReverseExponential>(A(6)), 0.36787944117144232159L, 3);  // u = q: 1 / e
  CHECK(slope<ReverseExponential>(kInf<A>) == 0);
  CHECK(slope<Identity>(kNan<A>) == 1);
  CHECK(slope<Relu>(kNan<A>) == 1);
  CHECK(slope<ClippedRelu>(kNan<A>) == 1);
  CHECK(slope<LogTailedRelu>(kNan<A>) == 1);
  CHECK(slope<ReverseExponential>(kNan<A>) == 1);
}

// The bounds that fast_slope.h and ste.h state, the latter down to the smallest subnormal.
void test_exp_minus() {
  CHECK(approximate_exp2_minus(0.0f) == 1 && approximate_exp2_minus(kInf<float>) == 0 &&
        approximate_exp2_minus(150.0f) == 0);
  CHECK(approximate_exp2_minus(149.0f) > 0);
  for (float y = 0; y < 126; y += 0x1p-12f) {
    const double wanted = std::exp2(-double(y));
    CHECK(std::fabs(approximate_exp2_minus(y) - wanted) <= 0x1p-13 * wanted);
    CHECK(std::fabs(approximate_exp2(y / 3, -3.0f) - wanted) <= 0x1p-13 * wanted);
  }
  CHECK(exp_minus(0.0f) == 1 && exp_minus(0.0) == 1);
  CHECK(exp_minus(kInf<float>) == 0 && exp_minus(kInf<double>) == 0);
  constexpr int kSteps = 200000;
  for (int i = 0; i <= kSteps; ++i) {
    const float t = 105.0f * i / kSteps;
    const double d = 750.0 * i / kSteps;
    CHECK_NEAR(exp_minus(t), std::exp(-double(t)), 2);
    CHECK_NEAR(exp_minus(d), std::exp(-static_cast<long double>(d)), 3);
  }
}

template <class A>
void test_alpha_grads() {
  CHECK(inside_value(AlphaGrad::three_valued, A(1)) == 1);
  CHECK(inside_value(AlphaGrad::three_valued, A(3)) == 2);
  CHECK(inside_value(AlphaGrad::three_valued, A(255)) == 128);
  CHECK(inside_value(AlphaGrad::two_valued, A(255)) == 0);
  CHECK(chain<Relu>(A(3), A(2)) == A(0.5));        // 2 - 1.5
  CHECK(chain<Relu>(A(-1), A(0)) == 0);
  CHECK(chain<Identity>(A(-1), A(0)) == A(0.5));   // 0 + 0.5
  CHECK(chain<LogTailedRelu>(A(8), A(3)) == 1);    // 3 - 4/2
  for (const A x : {kInf<A>, -kInf<A>}) {          // the slope is 0: no inf * 0
    CHECK(chain<ClippedRelu>(x, A(3)) == 3);
    CHECK(chain<ReverseExponential>(x, A(3)) == 3);
  }
  CHECK(times_slope(kInf<A>, A(0)) == 0 && times_slope(A(3), A(0.5)) == A(1.5));
}

template <int kWidth>
void test_fields(std::initializer_list<uint8_t> fields, uint64_t packed) {
  uint64_t bytes = 0;
  int shift = 0;
  for (const uint64_t field : fields) bytes |= field << shift, shift += 8;
  CHECK(ByteFields<kWidth>::gather(bytes) == packed);
  CHECK(ByteFields<kWidth>::scatter(packed) == bytes);
}

void test_bits() {
  const int widths[] = {1, 2, 4, 4, 8, 8, 8, 8};
  for (int bits = 1; bits <= 8; ++bits) CHECK(packed_width(bits) == widths[bits - 1]);
  CHECK(packed_bytes(int64_t{0}, 4) == 0 && packed_bytes(int64_t{9}, 1) == 2 && packed_bytes(int64_t{3}, 4) == 2);
  CHECK(packed_bytes((int64_t{1} << 33) + 1, 1) == (int64_t{1} << 30) + 1);
  test_fields<1>({1, 0, 1, 1, 0, 0, 0, 1}, 0b1000'1101);
  test_fields<2>({1, 2, 3, 0, 0, 0, 0, 2}, 0b10'00'00'00'00'11'10'01);
  test_fields<4>({0xa, 0x3, 0, 0, 0, 0, 0, 0xf}, 0xf000003a);
  test_fields<8>({1, 2, 3, 4, 5, 6, 7, 0xff}, 0xff07060504030201);
  CHECK(spread_bits(0b1011) == 0b01'00'01'01);
  CHECK(spread_bits(0xffffffff) == 0x5555555555555555);
  CHECK(unspread_bits(0b11'10'01'11) == 0b1011);  // the odd places are not looked at
}

}  // namespace

int main() {
  test_codes<float>();
  test_codes<double>();
  test_codes<bf16>();
  test_codes<f16>();
  test_signed_codes<float>();
  test_signed_codes<double>();
  test_signed_codes<bf16>();
  test_signed_codes<f16>();
  test_levels_of_groups<bf16>();
  test_levels_of_groups<f16>();
  test_signed_alpha<float>();
  test_signed_alpha<double>();
  test_signed_alpha_of_doubles();
  test_levels();
  test_half_precision();
  test_stes<float>();
  test_stes<double>();
  test_exp_minus();
  test_fast_slope<LogTailedRelu>();
  test_fast_slope<ReverseExponential>();
  test_alpha_grads<float>();
  test_alpha_grads<double>();
  test_bits();
  std::printf("%d failed\n", failures);
  return failures != 0;
}
