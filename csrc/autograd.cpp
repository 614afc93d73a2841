// The Autograd key: what is kept for the backward, and the backward itself. In C++ because a call then costs a
// fraction of a Python one; coarsegrad/_ops.py has the same rule in Python for where this library is absent.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "checks.h"
#include "register.h"

namespace cg {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch 2.13 counts the owners of a node in the node, torch before it beside the node. There deleteNode, found through
// the base class, takes a long graph apart without recursion.
template <class N>
auto new_node(auto&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) return c10::make_intrusive<N>(args...);
  else return std::shared_ptr<N>(new N(args...), [](N* node) { deleteNode(node); });
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor, Tensor> call_forward(const Tensor& x, const Tensor& alpha, int64_t bits,
                                                std::string_view rounding, std::string_view mask, bool codes,
                                                std::optional<int64_t> channel_dim) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, std::string_view,
                                                       std::string_view, bool, std::optional<int64_t>);
  static const auto op = find_op<Signature>("coarsegrad::qrelu_forward");
  return op.call(x, alpha, bits, rounding, mask, codes, channel_dim);
}

std::tuple<Tensor, Tensor> call_forward_(Tensor& x, const Tensor& alpha, int64_t bits, std::string_view rounding,
                                         std::string_view mask, bool codes, std::optional<int64_t> channel_dim) {
  using Signature = std::tuple<Tensor, Tensor>(Tensor&, const Tensor&, int64_t, std::string_view, std::string_view,
                                               bool, std::optional<int64_t>);
  static const auto op = find_op<Signature>("coarsegrad::qrelu_forward_");
  return op.call(x, alpha, bits, rounding, mask, codes, channel_dim);
}

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> call_backward(const Tensor& grad_y, const OptionalTensor& alpha, const OptionalTensor& x,
                                         const OptionalTensor& mask, const OptionalTensor& codes, int64_t bits,
                                         std::string_view ste, std::string_view rounding, std::string_view alpha_grad,
                                         double alpha_scale, std::optional<int64_t> channel_dim, bool need_grad_x,
                                         bool need_grad_alpha) {
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      int64_t, std::string_view, std::string_view, std::string_view, double, std::optional<int64_t>, bool, bool);
  static const auto op = find_op<Signature>("coarsegrad::qrelu_backward");
  return op.call(grad_y, alpha, x, mask, codes, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim, need_grad_x,
                 need_grad_alpha);
}

struct Settings {
  int64_t bits;
  Ste ste;
  Rounding rounding;
  AlphaGrad alpha_grad;
  double alpha_scale;
  std::optional<int64_t> channel_dim;
  bool need_grad_x = false, need_grad_alpha = false;

  Kept kept() const { return cg::kept(ste, rounding, alpha_grad, need_grad_x, need_grad_alpha); }
};

std::tuple<Tensor, Tensor> backward(const Settings& s, const Tensor& grad_y, const OptionalTensor& alpha,
                                    const OptionalTensor& x, const OptionalTensor& mask, const OptionalTensor& codes) {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();  // no derivative of this is wanted: one dispatch less
  return call_backward(grad_y, alpha, x, mask, codes, s.bits, name_of(s.ste, kStes), name_of(s.rounding, kRoundings),
                       name_of(s.alpha_grad, kAlphaGrads), s.alpha_scale, s.channel_dim, s.need_grad_x,
                       s.need_grad_alpha);
}

OptionalTensor given(Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt; }

// y -> (x, alpha). Holds no more than `kept` says.
struct QReluBackward : public Node {
  Settings settings;
  at::MemoryFormat memory_format = at::MemoryFormat::Contiguous;  // of y, and so of what is kept
  SavedVariable x, alpha, mask, codes;

  std::string name() const override { return "QReluBackward"; }

  void keep(const Kept& kept, const Tensor& x_in, const Tensor& alpha_in, const Tensor& mask_out,
            const Tensor& codes_out) {
    if (kept.x) {
      x = SavedVariable(x_in, /*is_output=*/false);
      alpha = SavedVariable(alpha_in, /*is_output=*/false);
    }
    if (kept.mask != MaskKind::nothing) mask = SavedVariable(mask_out, /*is_output=*/false);
    if (kept.codes) codes = SavedVariable(codes_out, /*is_output=*/false);
  }

  void release_variables() override {
    for (SavedVariable* saved : {&x, &alpha, &mask, &codes}) saved->reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    Tensor grad_y = grads[0];
    if (!grad_y.defined()) return {Tensor(), Tensor()};
    const Kept kept = settings.kept();
    if (!settings.need_grad_alpha && kept.mask == MaskKind::nothing && !kept.x) return {grad_y, Tensor()};  // identity
    auto [grad_x, grad_alpha] = backward(settings, grad_y.contiguous(memory_format), given(alpha.unpack()),
                                         given(x.unpack()), given(mask.unpack()), given(codes.unpack()));
    return {settings.need_grad_x ? grad_x : Tensor(), settings.need_grad_alpha ? grad_alpha : Tensor()};
  }

 private:
  bool released_ = false;
};

// With alpha fixed and a mask kept, dx is linear in dy, and the op is its own derivative.
struct QReluBackwardBackward : public Node {
  Settings settings;
  at::MemoryFormat memory_format = at::MemoryFormat::Contiguous;
  SavedVariable mask;

  std::string name() const override { return "QReluBackwardBackward"; }

  void release_variables() override {
    mask.reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!grads[0].defined()) return {Tensor()};
    return {std::get<0>(backward(settings, grads[0].contiguous(memory_format), std::nullopt, std::nullopt,
                                 given(mask.unpack()), std::nullopt))};
  }

 private:
  bool released_ = false;
};

Settings settings_of(const Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste,
                     std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                     std::optional<int64_t> channel_dim) {
  check_bits(bits);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(x) && !torch::autograd::isFwGradDefined(alpha),
      "qrelu has no forward-mode derivative: a coarse gradient is defined for the backward pass only");
  const bool grad = at::GradMode::is_enabled();
  return {bits, parse("ste", ste, kStes), parse("rounding", rounding, kRoundings),
          parse("alpha_grad", alpha_grad, kAlphaGrads), alpha_scale, channel_dim,
          grad && x.requires_grad(), grad && alpha.requires_grad()};
}

decltype(new_node<QReluBackward>()) make_node(const Settings& settings, const Tensor& x, const Tensor& alpha) {
  if (!settings.need_grad_x && !settings.need_grad_alpha) return nullptr;
  auto node = new_node<QReluBackward>();
  node->settings = settings;
  node->set_next_edges(torch::autograd::collect_next_edges(x, alpha));
  return node;
}

Tensor qrelu(const Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
             std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  const Settings settings = settings_of(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
  const Kept kept = settings.kept();
  const auto node = make_node(settings, x, alpha);
  Tensor y, mask, codes;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, mask, codes) =
        call_forward(x, alpha, bits, rounding, name_of(kept.mask, kMaskKinds), kept.codes, channel_dim);
  }
  if (node) {
    node->memory_format = y.suggest_memory_format();
    node->keep(kept, x, alpha, mask, codes);
    torch::autograd::set_history(y, node);
  }
  return y;
}

Tensor& qrelu_(Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
               std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  const Settings settings = settings_of(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
  const Kept kept = settings.kept();
  TORCH_CHECK_VALUE(!kept.x, "inplace must be False for ste '", ste, "' with alpha_grad '", alpha_grad,
                    "' here: the backward needs x, which would be overwritten");
  torch::autograd::check_inplace(x, settings.need_grad_x || settings.need_grad_alpha);
  const auto node = make_node(settings, x, alpha);
  Tensor mask, codes;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(mask, codes) =
        call_forward_(x, alpha, bits, rounding, name_of(kept.mask, kMaskKinds), kept.codes, channel_dim);
  }
  torch::autograd::increment_version(x);
  if (node) {
    node->memory_format = x.suggest_memory_format();
    node->keep(kept, x, alpha, mask, codes);
    torch::autograd::rebase_history(x, node);
  }
  return x;
}

std::tuple<Tensor, Tensor> qrelu_backward(const Tensor& grad_y, const OptionalTensor& alpha, const OptionalTensor& x,
                                          const OptionalTensor& mask, const OptionalTensor& codes, int64_t bits,
                                          std::string_view ste, std::string_view rounding, std::string_view alpha_grad,
                                          double alpha_scale, std::optional<int64_t> channel_dim, bool need_grad_x,
                                          bool need_grad_alpha) {
  const auto requires_grad = [](const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); };
  const bool twice =
      at::GradMode::is_enabled() && (requires_grad(grad_y) || requires_grad(alpha) || requires_grad(x));
  std::tuple<Tensor, Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = call_backward(grad_y, alpha, x, mask, codes, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim,
                        need_grad_x, need_grad_alpha);
  }
  if (!twice) return out;
  auto& [grad_x, grad_alpha] = out;
  if (!need_grad_alpha && !x) {
    auto node = new_node<QReluBackwardBackward>();
    node->settings = {bits, parse("ste", ste, kStes), parse("rounding", rounding, kRoundings),
                      parse("alpha_grad", alpha_grad, kAlphaGrads), alpha_scale, channel_dim, need_grad_x, false};
    node->memory_format = grad_y.suggest_memory_format();
    if (mask) node->mask = SavedVariable(*mask, /*is_output=*/false);
    node->set_next_edges(torch::autograd::collect_next_edges(grad_y));
    torch::autograd::set_history(grad_x, node);
  } else {
    auto node = new_node<torch::autograd::Error>(
        "qrelu can be differentiated twice only where alpha is fixed and the backward keeps no x (ste '" +
        std::string(ste) + "', alpha_grad '" + std::string(alpha_grad) + "')");
    node->set_next_edges(torch::autograd::collect_next_edges(grad_y, alpha ? *alpha : Tensor(), x ? *x : Tensor()));
    if (need_grad_x) torch::autograd::set_history(grad_x, node);
    if (need_grad_alpha) torch::autograd::set_history(grad_alpha, node);
  }
  return out;
}

}  // namespace

Tensor dispatch_qrelu(const Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste,
                      std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                      std::optional<int64_t> channel_dim) {
  static const auto op = find_op<decltype(qrelu)>("coarsegrad::qrelu");
  return op.call(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
}

Tensor dispatch_qrelu_(Tensor x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
                       std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  static const auto op = find_op<decltype(qrelu_)>("coarsegrad::qrelu_");
  return op.call(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
}

void register_autograd(torch::Library& library) {
  library.impl("qrelu", qrelu);
  library.impl("qrelu_", qrelu_);
  library.impl("qrelu_backward", qrelu_backward);
}

}  // namespace cg
