// A register of compare keys (math/dtype.h): what both widths do alike. Key is the CompareKey that derives from these.
#pragma once

#include "../generic/no_compare_key.h"
#include "vec.h"

namespace cg::CG_ISA {

// 16-bit numbers, as integers.
template <class T, class Key>
struct CompareKey16 {
  static constexpr int kCount = sizeof(Register) / sizeof(T);
  using Element = int16_t;
  using Index = Register;
  Register v;

  static CG_HD Index indices(int from) { return CG_MM(set1_epi16)(static_cast<short>(from)); }
  static CG_HD Key all(int from) { return {{indices(from)}}; }
  static CG_HD Key load(const int16_t* p) { return {{load_register(p)}}; }
  static CG_HD void store(int16_t* p, Key a) { store_register(p, a.v); }
  static CG_HD void stream(int16_t* p, Key a) { stream_register(p, a.v); }

  // Magnitudes are those of the numbers. Ties of `rounded` to bfloat16 go up.
  static CG_HD Key max_magnitude(Key a, Key b) { return {{CG_MM(max_epi16)(a.v, b.v & indices(0x7fff))}}; }
  CG_HD Pair<Floats> floats() const { return split<T>(v); }
  static CG_HD Key rounded(Pair<Floats> from) { return {{join<T, false>(from)}}; }
  static CG_HD Key level(Pair<Floats> from) { return {{join<T>(from)}}; }
  // Rounds down to T; `from` is not negative.
  static CG_HD Key floor(Pair<Floats> from) {
    if constexpr (std::is_same_v<T, bf16>) {
      return {{blend_odd(CG_MM(srli_epi32)(from.first.bits(), 16), from.second.bits())}};
    } else {
      const auto halves = [](Floats v) { return CG_MM(cvtps_ph)(v.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); };
      return {{join_halves(halves(from.first), halves(from.second))}};
    }
  }
  static CG_HD Key of(Index from) { return {{from}}; }
  static CG_HD Index whole(Key from) { return from.v; }
  static CG_HD Index whole(Pair<Floats> from) {
    return Key::narrow(CG_MM(cvtps_epi32)(from.first.v), CG_MM(cvtps_epi32)(from.second.v));
  }

  CG_HD Key plus(int by) const { return {{CG_MM(add_epi16)(v, indices(by))}}; }
  static CG_HD auto differ(Key a, Key b) { return Key::greater(a, b) | Key::greater(b, a); }
  static CG_HD Key clamp(Key a, Key low, Key high) {
    return {{CG_MM(max_epi16)(CG_MM(min_epi16)(a.v, high.v), low.v)}};
  }

  // Numbers halfway between two of T, and rounding to T with ties up. Constants are hidden from the compiler, which
  // would make them anew for each block.
  struct Halves {
    Register one = indices(1), half = CG_MM(set1_epi32)(std::is_same_v<T, bf16> ? 0x8000 : 0x1000);
    CG_HD Halves() { asm("" : "+v"(one), "+v"(half)); }

    // As floats, halfway to the next number of T from the one below x; from one between `low` and `high`, if x is not.
    // (Not of subnormal numbers of float16.)
    CG_HD Pair<Floats> halfway_down(Key x, Key low, Key high) const {
      const Register below = clamp({{CG_MM(subs_epi16)(x.v, one)}}, low, high).v;
      if constexpr (std::is_same_v<T, bf16>) {
        return {Floats::of_bits(blend_odd(half, CG_MM(slli_epi32)(below, 16))),
                Floats::of_bits(blend_odd(half, below))};
      } else {
        const Pair<Floats> v = split<T>(below);
        return {Floats::of_bits(CG_MM(add_epi32)(v.first.bits(), half)),
                Floats::of_bits(CG_MM(add_epi32)(v.second.bits(), half))};
      }
    }
    CG_HD Key rounded(Pair<Floats> v) const {
      if constexpr (std::is_same_v<T, bf16>) {
        const Register even = CG_MM(add_epi32)(v.first.bits(), half), odd = CG_MM(add_epi32)(v.second.bits(), half);
        return {{blend_odd(CG_MM(srli_epi32)(even, 16), odd)}};
      } else {
        return CompareKey16::rounded(v);
      }
    }
  };
};

template <class Key>
struct CompareKey32 {
  static constexpr int kCount = sizeof(Register) / sizeof(float);
  using Element = float;
  FloatRegister<float> v;

  static CG_HD Key all(float from) { return {{broadcast(from)}}; }
  static CG_HD Key load(const float* p) { return {{CG_MM(loadu_ps)(p)}}; }
  static CG_HD void store(float* p, Key a) { CG_MM(storeu_ps)(p, a.v); }
  static CG_HD void stream(float* p, Key a) { CG_MM(stream_ps)(p, a.v); }

  CG_HD Register bits() const { return Floats(v).bits(); }
  static CG_HD Key max_magnitude(Key a, Key b) {
    const Register magnitude = b.bits() & CG_MM(set1_epi32)(0x7fffffff);
    return {{Floats::of_bits(CG_MM(max_epi32)(a.bits(), magnitude)).v}};
  }
  CG_HD Floats floats() const { return v; }
  static CG_HD Key rounded(Floats from) { return {{from.v}}; }
  static CG_HD Key level(Floats from) { return {{from.v}}; }
  static CG_HD Key floor(Floats from) { return {{from.v}}; }
  static CG_HD Floats load_floats(const float* p) { return Io<float>::load(p); }
};

}  // namespace cg::CG_ISA
