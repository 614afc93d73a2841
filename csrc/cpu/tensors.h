// What the ops on CPU tensors share: allocation, how the work is cut, and alphas.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cmath>
#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace cg {

// Output at least this large leaves the caches anyway: store past them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
// Blocks a thread takes at least; the same 32768 elements as torch's own elementwise loops.
constexpr int64_t kGrainBlocks = 512;
inline int64_t block_total(int64_t count) { return (count + kBlock - 1) / kBlock; }

inline bool streams(const at::Tensor& out) {
  return out.nbytes() >= kStreamBytes && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
}

inline at::Tensor empty_bytes(int64_t bytes) { return at::detail::empty_cpu({bytes}, at::kByte); }
inline at::Tensor empty_in(const at::Tensor& t, at::MemoryFormat format) {
  return at::detail::empty_cpu(t.sizes(), t.scalar_type(), /*pin_memory=*/false, format);
}
inline at::Tensor empty_as(const at::Tensor& t) { return empty_in(t, t.suggest_memory_format()); }

// alpha, checked, in the compute type, with what the kernels need beside it.
template <class A>
struct PreparedAlphas {
  c10::SmallVector<A, 4> alpha, inverse;
  Alphas alphas;

  template <class T>
  void fill(const A* values, int64_t count, Channels channels, int top, Rounding rounding, bool per_channel) {
    const int64_t length = channels.count > 1 && channels.inner == 1 ? count + kBlock : count;
    alpha.resize(length);
    inverse.resize(length);
    bool all_regular = true;
    for (int64_t i = 0; i < count; ++i) {
      const A a = values[i];
      if (!(a > 0) || !std::isfinite(a)) {
        TORCH_CHECK_VALUE(!per_channel, "alpha must be finite and positive, got ", a, " at channel ", i);
        TORCH_CHECK_VALUE(false, "alpha must be finite and positive, got ", a);
      }
      alpha[i] = a;
      inverse[i] = reciprocal(a, rounding);
      all_regular &= regular<T>(a, A(top));
    }
    for (int64_t i = count; i < length; ++i) alpha[i] = alpha[i - count], inverse[i] = inverse[i - count];
    alphas = {alpha.data(), channels.count, channels.inner, inverse.data(), all_regular};
  }
};

// body(prepared alphas) with alpha in the type that x's dtype is computed in. top: the number of the top level.
template <class Body>
void with_alphas(const at::Tensor& dense, Dtype dtype, const at::Tensor& alpha, int top, Rounding rounding,
                 std::optional<int64_t> channel_dim, const Body& body) {
  const Channels channels = channels_of(dense, channel_dim);
  const int64_t expected = check_alpha(alpha, dense, channel_dim);
  const auto run = [&](auto zero, at::ScalarType compute) {
    using A = decltype(zero);
    at::Tensor converted = alpha;
    if (alpha.scalar_type() != compute || !alpha.is_contiguous()) converted = alpha.to(compute).contiguous();
    PreparedAlphas<A> prepared;
    const A* values = converted.const_data_ptr<A>();
    const auto fill = [&](auto tag) {
      prepared.template fill<decltype(tag)>(values, expected, channels, top, rounding, channel_dim.has_value());
    };
    if constexpr (std::is_same_v<A, double>) fill(double{});
    else if (dtype == Dtype::float16) fill(f16{});
    else fill(float{});  // bfloat16 has the same range
    body(prepared.alphas);
  };
  if (dtype == Dtype::float64) run(double{}, at::kDouble);
  else run(float{}, at::kFloat);
}

}  // namespace cg
