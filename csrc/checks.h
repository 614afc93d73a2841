// Names to enumerators, and the messages for arguments that reach an op without passing the public functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>

#include "cpu/kernels.h"

namespace cg {

template <class E>
struct Named {
  const char* name;
  E value;
};

inline constexpr Named<Ste> kStes[] = {
#define CG_NAME(name, Struct) {#name, Ste::name},
    CG_FOR_EACH_STE(CG_NAME)
#undef CG_NAME
};
inline constexpr Named<AlphaGrad> kAlphaGrads[] = {
#define CG_NAME(name) {#name, AlphaGrad::name},
    CG_FOR_EACH_ALPHA_GRAD(CG_NAME)
#undef CG_NAME
};
inline constexpr Named<Rounding> kRoundings[] = {
    {"ceil", Rounding::ceil}, {"nearest", Rounding::nearest}, {"hwgq", Rounding::hwgq}};
inline constexpr Named<MaskKind> kMaskKinds[] = {{"nothing", MaskKind::nothing},
                                                 {"positive", MaskKind::positive},
                                                 {"inside", MaskKind::inside},
                                                 {"state", MaskKind::state}};

template <class E, size_t N>
E parse(const char* argument, std::string_view got, const Named<E> (&known)[N]) {
  for (const auto& entry : known) {
    if (got == entry.name) return entry.value;
  }
  std::string names;
  for (const auto& entry : known) names += (names.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  TORCH_CHECK_VALUE(false, argument, " must be one of ", names, ", got '", got, "'");
}

template <class E, size_t N>
std::string_view name_of(E value, const Named<E> (&known)[N]) {
  for (const auto& entry : known) {
    if (value == entry.value) return entry.name;
  }
  return "?";
}

inline Needs needs_of(Ste ste) {
  switch (ste) {
#define CG_CASE(name, Struct) \
  case Ste::name: return Struct::kNeeds;
    CG_FOR_EACH_STE(CG_CASE)
#undef CG_CASE
  }
  return Needs::x;
}

// What the backward keeps of x: the least that spec section 4 allows. alpha's value is needed only beside x.
struct Kept {
  MaskKind mask = MaskKind::nothing;
  bool codes = false;
  bool x = false;
};

inline Kept kept(Ste ste, Rounding rounding, AlphaGrad rule, bool need_grad_x, bool need_grad_alpha) {
  const Needs gate = need_grad_x ? needs_of(ste) : Needs::nothing;
  if (gate == Needs::x || (need_grad_alpha && rule == AlphaGrad::chain)) return {MaskKind::nothing, false, true};
  if (need_grad_alpha && rule != AlphaGrad::exact) return {MaskKind::state, false, false};
  Kept kept{MaskKind::nothing, need_grad_alpha, false};
  if (gate == Needs::inside) kept.mask = MaskKind::inside;
  // Under ceil and hwgq a kept code is positive exactly where x is.
  if (gate == Needs::positive && !(kept.codes && rounding != Rounding::nearest)) kept.mask = MaskKind::positive;
  return kept;
}

inline void check_bits(int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, "bits must be an integer from 1 to 8, got ", bits);
}

}  // namespace cg
