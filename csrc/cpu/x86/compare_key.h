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
  static CG_HD Index whole(Key from) { return from.v; }
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
};

}  // namespace cg::CG_ISA
