// One number at a time: the baseline build.
#pragma once

#include "../generic/pair.h"

#define CG_ISA scalar

namespace cg::scalar {

template <class A>
using Vec = A;

template <class A>
struct Lanes {
  static constexpr int kCount = 1;
  static CG_HD uint64_t bits(bool m) { return m; }
  static CG_HD bool mask(uint64_t bits) { return bits & 1; }
  static CG_HD void store_codes(uint8_t* p, A code) { *p = static_cast<uint8_t>(code); }
  static CG_HD A load_codes(const uint8_t* p) { return A(*p); }
  template <int kDistance>
  static CG_HD A exchange(A v) = delete;
  static CG_HD A sum(A v) { return v; }
};

template <class T>
CG_HD compute_t<T> round_for_store(compute_t<T> v) {
  return v;
}
CG_HD float widen(float v) { return v; }
CG_HD double widen(double v) { return v; }
CG_HD float widen(bf16 v) { return to_float(v); }
CG_HD float widen(f16 v) { return to_float(v); }
CG_HD void narrow(float* p, float v) { *p = v; }
CG_HD void narrow(double* p, double v) { *p = v; }
CG_HD void narrow(bf16* p, float v) { *p = to_bf16(v); }
CG_HD void narrow(f16* p, float v) { *p = to_f16(v); }

template <class T>
struct Io {
  static CG_HD compute_t<T> load(const T* p) { return widen(*p); }
  static CG_HD void store(T* p, compute_t<T> v) { narrow(p, v); }
  static CG_HD void stream(T* p, compute_t<T> v) { narrow(p, v); }
};

template <class T>
CG_HD auto load_pair(const T* p) {
  return Pair{Io<T>::load(p), Io<T>::load(p + 1)};
}
template <class T, class A>
CG_HD void store_pair(T* p, Pair<A> v, bool) {
  Io<T>::store(p, v.first), Io<T>::store(p + 1, v.second);
}

template <class T, class A>
CG_HD void store_rounded_pair(T* p, Pair<A> v, bool stream) {
  store_pair(p, v, stream);
}
template <class T, class A>
CG_HD void store_code_pair(uint8_t* p, Pair<A> codes) {
  Lanes<A>::store_codes(p, codes.first), Lanes<A>::store_codes(p + 1, codes.second);
}

template <class T>
constexpr bool kHasMagnitudes = false;
template <class T>
struct Magnitudes;

constexpr bool kAnyAlpha = true;
constexpr int kPrefetchBytes = 0, kChains = 1;

CG_HD void stream_fence() {}

}  // namespace cg::scalar
