// Names and numbers of enumerators, and the checks of arguments that reach an op without passing the public functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "math/alpha_grad.h"
#include "math/bits.h"

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
                                                 {"state", MaskKind::state},
                                                 {"near", MaskKind::near}};

// The ops that users' graphs contain take names; the ops that these call take the enumerators' numbers.
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
E parse(const char* argument, int64_t got, const Named<E> (&known)[N]) {
  TORCH_CHECK_VALUE(got >= 0 && got < int64_t{N}, argument, " must be a number in 0..", N - 1, ", got ", got);
  return known[got].value;
}

template <class E, size_t N>
const char* name_of(E value, const Named<E> (&known)[N]) {
  return known[static_cast<size_t>(value)].name;
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

// What is saved for backward: the least that docs/spec.md allows. alpha's value is needed only together with x.
struct Saved {
  MaskKind mask = MaskKind::nothing;
  bool codes = false;
  bool x = false;
};

inline Saved saved(Ste ste, Rounding rounding, AlphaGrad rule, bool need_grad_x, bool need_grad_alpha) {
  const Needs gate = need_grad_x ? needs_of(ste) : Needs::nothing;
  const bool by_state = need_grad_alpha && (rule == AlphaGrad::three_valued || rule == AlphaGrad::two_valued);
  if (gate == Needs::x || (need_grad_alpha && rule == AlphaGrad::chain) || (gate == Needs::near && by_state))
    return {MaskKind::nothing, false, true};  // no state tells what is near
  if (by_state) return {MaskKind::state, false, false};
  Saved saved{MaskKind::nothing, need_grad_alpha, false};
  if (gate == Needs::inside) saved.mask = MaskKind::inside;
  if (gate == Needs::near) saved.mask = MaskKind::near;
  // Under ceil and hwgq T[1] = 0, so that x > 0 is c > 0.
  if (gate == Needs::positive && !(saved.codes && rounding != Rounding::nearest)) saved.mask = MaskKind::positive;
  return saved;
}

inline void check_bits(int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, "bits must be an int in 1..8, got ", bits);
}

// alpha_scale as a number. Compiled code passes infinity for "lsq", 1 / sqrt(n q) for n elements per sample, as it does
// not know n. The same double as reference.py's.
inline double number_of_scale(double alpha_scale, const at::Tensor& grad_y, int64_t bits) {
  if (!std::isinf(alpha_scale)) return alpha_scale;
  const int64_t n = grad_y.dim() > 0 ? grad_y.numel() / std::max<int64_t>(grad_y.size(0), 1) : 1;
  return 1 / std::sqrt(static_cast<double>(std::max<int64_t>(n, 1) * ((int64_t{1} << bits) - 1)));
}

inline Dtype dtype_of(const at::Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kBFloat16: return Dtype::bfloat16;
    case at::kHalf: return Dtype::float16;
    default: TORCH_CHECK_TYPE(false, argument, " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

struct Channels {
  int64_t count = 1, inner = 1;
};

// `dense` is contiguous in its memory format, so that a dim's stride is the number of elements inside it.
inline Channels channels_of(const at::Tensor& dense, std::optional<int64_t> channel_dim) {
  if (!channel_dim) return {};
  const int64_t dim = *channel_dim < 0 ? *channel_dim + dense.dim() : *channel_dim;
  TORCH_CHECK_VALUE(dim >= 0 && dim < dense.dim(), "channel_dim must be a dimension of x, which has ", dense.dim(),
                    ", got ", *channel_dim);
  const int64_t count = dense.size(dim);
  return count <= 1 ? Channels{} : Channels{count, dense.stride(dim)};  // 0 channels: no elements
}

// Checks all but alpha's values; returns how many there must be.
inline int64_t check_alpha(const at::Tensor& alpha, const at::Tensor& x, std::optional<int64_t> channel_dim) {
  const int64_t expected = channel_dim ? x.size(*channel_dim) : 1;
  TORCH_CHECK_VALUE(alpha.dim() == 1 && alpha.size(0) == expected, "alpha must have shape [", expected, "]",
                    channel_dim ? " (the channels of x)" : "", ", got ", alpha.sizes());
  TORCH_CHECK_VALUE(alpha.device() == x.device(), "alpha must be on the device of x, ", x.device(), ", got ",
                    alpha.device());
  TORCH_CHECK_TYPE(at::isFloatingType(alpha.scalar_type()), "alpha must be a floating-point tensor, got ",
                   alpha.scalar_type());
  return expected;
}

// `group` consecutive elements of x's last dimension.
inline void check_group(const char* argument, int64_t group, int64_t size) {
  TORCH_CHECK_VALUE(group >= 1 && size % group == 0, argument, " must be >= 1 and divide x's last dimension, ", size,
                    ", got ", group);
}

inline void check_hadamard(const at::Tensor& x, int64_t size) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x must have at least one dimension, got a 0-d tensor");
  check_group("size", size, x.size(-1));
  TORCH_CHECK_VALUE((size & (size - 1)) == 0, "size must be a power of two, got ", size);
}

// Weights of few bits, with channels first if there is a scale for each.
inline void check_weight(const at::Tensor& weight, int64_t bits, bool channels) {
  TORCH_CHECK_VALUE(bits == 8 || bits == 4 || bits == 2 || bits == 1, "bits must be one of 8, 4, 2, 1, got ", bits);
  int64_t count = 1;
  for (int64_t dim = channels ? 1 : 0; dim < weight.dim(); ++dim) count *= weight.size(dim);
  TORCH_CHECK_VALUE(count <= int64_t{1} << 25, "weight must have at most 2**25 elements for each scale, got ", count);
}

// A weight as rows in memory, one for each scale, of `length` numbers in any order.
struct WeightRows {
  at::Tensor dense;
  int64_t rows, length;
};
inline WeightRows weight_rows(const at::Tensor& weight, int64_t bits, std::optional<int64_t> channel_dim) {
  const at::Tensor by_row = channel_dim ? weight.movedim(*channel_dim, 0) : weight;
  check_weight(by_row, bits, channel_dim.has_value());
  const int64_t rows = channel_dim ? by_row.size(0) : 1;
  return {by_row.contiguous(by_row.suggest_memory_format()), rows, rows > 0 ? by_row.numel() / rows : 0};
}

inline void check_signed_bits(int64_t bits) {
  check_bits(bits);
  TORCH_CHECK_VALUE(bits != 1, "bits must be an int in 2..8 for the signed staircase, got 1");
}

// Checks what a signed staircase is given, all but alpha. Returns how many elements share a dynamic alpha; 0 if it is
// given.
inline int64_t check_signed(const at::Tensor& x, bool alpha_given, int64_t bits, std::optional<int64_t> group,
                            std::optional<int64_t> channel_dim) {
  check_signed_bits(bits);
  if (alpha_given) {
    TORCH_CHECK_VALUE(!group, "group must be None if alpha is given, got ", *group);
    return 0;
  }
  TORCH_CHECK_VALUE(!channel_dim, "channel_dim must be None for a dynamic alpha, got ", *channel_dim);
  TORCH_CHECK_VALUE(x.dim() > 0, "x must have at least one dimension for a dynamic alpha, got a 0-d tensor");
  const int64_t size = x.size(-1);
  if (size == 0) return 1;
  check_group("group", group.value_or(size), size);
  return group.value_or(size);
}

// A norm over x's last dimension and its staircase, none without bits. Returns how many elements share a dynamic alpha.
inline int64_t check_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                          const std::optional<at::Tensor>& bias, std::optional<int64_t> bits,
                          std::optional<int64_t> group, std::optional<int64_t> rotation, bool output) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x must have at least one dimension, got a 0-d tensor");
  const auto check = [&](const char* argument, const at::Tensor& parameter) {
    TORCH_CHECK_VALUE(parameter.dim() == 1 && parameter.size(0) == x.size(-1), argument, " must have shape [",
                      x.size(-1), "] (x's last dimension), got ", parameter.sizes());
    TORCH_CHECK_VALUE(parameter.device() == x.device(), argument, " must be on the device of x, ", x.device(), ", got ",
                      parameter.device());
    TORCH_CHECK_TYPE(at::isFloatingType(parameter.scalar_type()), argument, " must be of a floating dtype, got ",
                     parameter.scalar_type());
  };
  if (weight) check("weight", *weight);
  if (bias) check("bias", *bias);
  TORCH_CHECK_VALUE(bits || output, "output must be True if bits is None, got False");
  if (!bits) return 0;
  if (rotation) check_hadamard(x, *rotation);
  return check_signed(x, false, *bits, group, std::nullopt);
}

// Those of y's dynamic alpha.
inline void check_group_alphas(const at::Tensor& alpha, const at::Tensor& y, int64_t group) {
  TORCH_CHECK_VALUE(group >= 1 && y.numel() % group == 0 && alpha.numel() == y.numel() / group,
                    "alpha must have one value for each ", group, " of ", y.numel(), " elements, got ", alpha.numel());
  TORCH_CHECK_VALUE(alpha.device() == y.device(), "alpha must be on ", y.device(), ", got ", alpha.device());
}

inline void check_packed(const at::Tensor& packed, const char* argument, int64_t count, int width, at::Device device) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, argument, " must be uint8, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.is_contiguous() && packed.numel() == packed_bytes(count, width), argument, " must hold ",
                    packed_bytes(count, width), " bytes for ", count, " elements of ", width, " bits, got ",
                    packed.numel());
  TORCH_CHECK_VALUE(packed.device() == device, argument, " must be on ", device, ", got ", packed.device());
}

// The slope of each code.
inline void check_slopes(const at::Tensor& slopes, const at::Tensor& grad_y, int64_t bits) {
  const at::ScalarType wide = grad_y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(slopes.scalar_type() == wide, "slopes must be ", wide, " for grad_y of ", grad_y.scalar_type(),
                   ", got ", slopes.scalar_type());
  TORCH_CHECK_VALUE(slopes.is_contiguous() && slopes.dim() == 1 && slopes.numel() == int64_t{1} << bits,
                    "slopes must be contiguous, of shape [", int64_t{1} << bits, "], got ", slopes.sizes());
  TORCH_CHECK_VALUE(slopes.device() == grad_y.device(), "slopes must be on ", grad_y.device(), ", got ",
                    slopes.device());
}

// Checks that what a backward needs was passed and fits grad_y.
inline void check_saved(const Saved& saved, const at::Tensor& grad_y, const std::optional<at::Tensor>& alpha,
                        const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& mask,
                        const std::optional<at::Tensor>& codes, int64_t bits, Ste ste, AlphaGrad rule) {
  const int64_t count = grad_y.numel();
  const char *ste_name = name_of(ste, kStes), *rule_name = name_of(rule, kAlphaGrads);
  if (saved.x) {
    TORCH_CHECK_VALUE(x && alpha, "x and alpha must be given for ste '", ste_name, "' with alpha_grad '", rule_name,
                      "'");
    TORCH_CHECK_VALUE(x->sizes() == grad_y.sizes() && x->scalar_type() == grad_y.scalar_type(),
                      "x must have the shape and dtype of grad_y, got ", x->sizes(), " ", x->scalar_type());
    TORCH_CHECK_VALUE(x->device() == grad_y.device(), "x must be on ", grad_y.device(), ", got ", x->device());
  }
  if (saved.mask != MaskKind::nothing) {
    TORCH_CHECK_VALUE(mask, "mask must be given for ste '", ste_name, "' with alpha_grad '", rule_name, "'");
    check_packed(*mask, "mask", count, mask_width(saved.mask), grad_y.device());
  }
  if (saved.codes) {
    TORCH_CHECK_VALUE(codes, "codes must be given for alpha_grad '", rule_name, "'");
    check_packed(*codes, "codes", count, packed_width(static_cast<int>(bits)), grad_y.device());
  }
}

}  // namespace cg
