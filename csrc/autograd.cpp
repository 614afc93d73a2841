// The Autograd key: what is saved for backward, and the backward itself. In C++ a call costs a fraction of a Python
// one; coarsegrad/_autograd.py is the same in Python, for custom STEs and for use without this library.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "register.h"

namespace cg {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch 2.13 made nodes intrusive. Before that a shared_ptr holds them, and deleteNode, found through the base class,
// destroys a long graph without recursion.
template <class N>
auto new_node(auto&&... args) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) return c10::make_intrusive<N>(args...);
  else return std::shared_ptr<N>(new N(args...), [](N* node) { deleteNode(node); });
}

using OptionalTensor = std::optional<Tensor>;

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The ops that this file calls, by way of the dispatcher.
struct Ops {
  c10::TypedOperatorHandle<QReluOp> qrelu = find_op<QReluOp>("coarsegrad::qrelu");
  c10::TypedOperatorHandle<QReluInplaceOp> qrelu_ = find_op<QReluInplaceOp>("coarsegrad::qrelu_");
  c10::TypedOperatorHandle<ForwardOp> forward = find_op<ForwardOp>("coarsegrad::qrelu_forward");
  c10::TypedOperatorHandle<ForwardInplaceOp> forward_ = find_op<ForwardInplaceOp>("coarsegrad::qrelu_forward_");
  c10::TypedOperatorHandle<BackwardOp> backward = find_op<BackwardOp>("coarsegrad::qrelu_backward");
};
const Ops& ops() {
  static const Ops found;
  return found;
}

struct Settings {
  int64_t bits;
  Ste ste;
  Rounding rounding;
  AlphaGrad alpha_grad;
  double alpha_scale;
  std::optional<int64_t> channel_dim;
  bool need_grad_x = false, need_grad_alpha = false;

  Saved saved() const { return cg::saved(ste, rounding, alpha_grad, need_grad_x, need_grad_alpha); }
};

std::tuple<Tensor, Tensor> backward(const Settings& s, const Tensor& grad_y, const OptionalTensor& alpha,
                                    const OptionalTensor& x, const OptionalTensor& mask, const OptionalTensor& codes) {
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
  if (!at::GradMode::is_enabled()) guard.emplace();  // no second derivative: one dispatch less
  return ops().backward.call(grad_y, alpha, x, mask, codes, s.bits, int64_t(s.ste), int64_t(s.rounding),
                             int64_t(s.alpha_grad), s.alpha_scale, s.channel_dim, s.need_grad_x, s.need_grad_alpha);
}

OptionalTensor given(Tensor t) { return t.defined() ? OptionalTensor(std::move(t)) : std::nullopt; }

// Everything in a QReluBackward but its tensors: what compiled autograd specialises on.
struct Rule {
  Settings settings;
  at::MemoryFormat memory_format;  // of y, and so of the saved bits

  variable_list gradients(const Tensor& grad_y, const OptionalTensor& alpha, const OptionalTensor& x,
                          const OptionalTensor& mask, const OptionalTensor& codes) const {
    if (!grad_y.defined()) return {Tensor(), Tensor()};
    const Saved saved = settings.saved();
    if (!settings.need_grad_alpha && saved.mask == MaskKind::nothing && !saved.x)
      return {grad_y, Tensor()};  // identity
    auto [grad_x, grad_alpha] = backward(settings, grad_y.contiguous(memory_format), alpha, x, mask, codes);
    return {settings.need_grad_x ? grad_x : Tensor(), settings.need_grad_alpha ? grad_alpha : Tensor()};
  }

  std::vector<int64_t> numbers() const {
    const Settings& s = settings;
    return {s.bits,
            int64_t(s.ste),
            int64_t(s.rounding),
            int64_t(s.alpha_grad),
            s.channel_dim.has_value(),
            s.channel_dim.value_or(0),
            s.need_grad_x,
            s.need_grad_alpha,
            int64_t(memory_format)};
  }
  static Rule of(const std::vector<int64_t>& n, double alpha_scale) {
    const auto channel_dim = n[4] ? std::optional<int64_t>(n[5]) : std::nullopt;
    return {{n[0], Ste(n[1]), Rounding(n[2]), AlphaGrad(n[3]), alpha_scale, channel_dim, n[6] != 0, n[7] != 0},
            at::MemoryFormat(n[8])};
  }
};

namespace compiled = torch::dynamo::autograd;

// QReluBackward::apply for compiled autograd, which traces it with the `args` that apply_with_saved packs.
variable_list apply_to_packed(const variable_list& grads, const std::vector<c10::IValue>& args) {
  compiled::PackedArgs packed(args);
  const auto outputs = packed.unpack<int64_t>();
  const auto numbers = packed.unpack<std::vector<int64_t>>();
  const Rule rule = Rule::of(numbers, packed.unpack<double>());
  OptionalTensor saved[4];
  for (OptionalTensor& t : saved) t = packed.unpack<OptionalTensor>();
  variable_list result = rule.gradients(grads[0], saved[0], saved[1], saved[2], saved[3]);
  result.resize(outputs);
  return result;
}

// dy -> (dx, dalpha), holding no more than `Settings::saved` lists. If alpha is fixed and x is not saved, dx is linear
// in dy, and its derivative is the same node with one output.
struct QReluBackward : public Node {
  Rule rule;
  SavedVariable alpha, x, mask, codes;

  explicit QReluBackward(const Rule& rule) : rule(rule) {}

  std::string name() const override { return num_outputs() == 2 ? "QReluBackward" : "QReluBackwardBackward"; }

  void save(const Tensor& x_in, const Tensor& alpha_in, const Tensor& mask_out, const Tensor& codes_out) {
    const Saved saved = rule.settings.saved();
    if (saved.x) {
      x = SavedVariable(x_in, /*is_output=*/false);
      alpha = SavedVariable(alpha_in, /*is_output=*/false);
    }
    if (saved.mask != MaskKind::nothing) mask = SavedVariable(mask_out, /*is_output=*/false);
    if (saved.codes) codes = SavedVariable(codes_out, /*is_output=*/false);
  }

  void release_variables() override {
    for (SavedVariable* saved : {&alpha, &x, &mask, &codes}) saved->reset_data();
    released_ = true;
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!grads[0].defined()) return variable_list(num_outputs());
    variable_list result =
        rule.gradients(grads[0], given(alpha.unpack()), given(x.unpack()), given(mask.unpack()), given(codes.unpack()));
    result.resize(num_outputs());
    return result;
  }

  void compiled_args(compiled::CompiledNodeArgs& args) const override {
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    args.collect(rule.numbers());
    args.collect(rule.settings.alpha_scale);
    for (const SavedVariable* saved : {&alpha, &x, &mask, &codes}) args.collect(*saved, /*is_output=*/false);
  }

  variable_list apply_with_saved(const variable_list& grads, compiled::SwapSavedVariables& swap) override {
    compiled::PackedArgs packed;
    std::vector<at::TypePtr> schema;
    const auto pack = [&]<class T>(const T& value) {
      packed.pack(value);
      schema.push_back(compiled::IValuePacker<T>::packed_type());
    };
    pack(int64_t(num_outputs()));
    pack(rule.numbers());
    pack(rule.settings.alpha_scale);
    for (SavedVariable* saved : {&alpha, &x, &mask, &codes}) {
      swap.before(*saved);
      pack(given(saved->unpack()));
    }
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string bound =
        compiler->bind_function(swap.get_py_compiler(), name(), apply_to_packed, schema, /*is_custom_function=*/true);
    using Metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>;
    variable_list result =
        compiler->call_function(swap.get_py_compiler(), "apply_functional", bound, grads, packed.vec(),
                                Metadata::pack(compiled::get_input_metadata(next_edges())));
    for (SavedVariable* saved : {&alpha, &x, &mask, &codes}) swap.after(*saved);
    return result;
  }

 private:
  bool released_ = false;
};

// Whether a transform of torch.func runs this kernel. Ops called below it then reach the outer transforms, each with an
// Autograd kernel of its own: y must come from an op that has a derivative.
bool in_functorch_kernel() {
  return c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerBackMode);
}

Settings settings_of(const Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste,
                     std::string_view rounding, std::string_view alpha_grad, double alpha_scale,
                     std::optional<int64_t> channel_dim) {
  check_bits(bits);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(x) && !torch::autograd::isFwGradDefined(alpha),
      "qrelu has no forward-mode derivative: a coarse gradient is defined for the backward pass only");
  const bool grad = at::GradMode::is_enabled();
  return {bits,
          parse("ste", ste, kStes),
          parse("rounding", rounding, kRoundings),
          parse("alpha_grad", alpha_grad, kAlphaGrads),
          alpha_scale,
          channel_dim,
          grad && x.requires_grad(),
          grad && alpha.requires_grad()};
}

// edges: of x and alpha, collected before an in-place op bumps x's version. A view makes its grad_fn again at the first
// look after that, which must be rebase_history's.
void set_history(Tensor& y, const Settings& settings, torch::autograd::edge_list edges, const Tensor& x,
                 const Tensor& alpha, const Tensor& mask, const Tensor& codes, bool inplace) {
  if (!settings.need_grad_x && !settings.need_grad_alpha) return;
  auto node = new_node<QReluBackward>(Rule{settings, y.suggest_memory_format()});
  node->set_next_edges(std::move(edges));
  node->save(x, alpha, mask, codes);
  if (inplace) torch::autograd::rebase_history(y, node);
  else torch::autograd::set_history(y, node);
}

Tensor qrelu(const Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
             std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  const Settings settings = settings_of(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
  const Saved saved = settings.saved();
  Tensor y, mask, codes;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(y, mask, codes) =
        ops().forward.call(x, alpha, bits, int64_t(settings.rounding), int64_t(saved.mask), saved.codes, channel_dim);
    if (in_functorch_kernel()) y = dispatch_qrelu(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
  }
  set_history(y, settings, torch::autograd::collect_next_edges(x, alpha), x, alpha, mask, codes, /*inplace=*/false);
  return y;
}

Tensor& qrelu_(Tensor& x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
               std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  const Settings settings = settings_of(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
  const Saved saved = settings.saved();
  TORCH_CHECK_VALUE(!saved.x, "inplace must be False for ste '", ste, "' with alpha_grad '", alpha_grad,
                    "' here: the backward needs x, which would be overwritten");
  torch::autograd::check_inplace(x, settings.need_grad_x || settings.need_grad_alpha);
  torch::autograd::edge_list edges = torch::autograd::collect_next_edges(x, alpha);
  const int64_t mode = int64_t(settings.rounding), kind = int64_t(saved.mask);
  Tensor y, mask, codes;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (in_functorch_kernel()) {
      std::tie(y, mask, codes) = ops().forward.call(x, alpha, bits, mode, kind, saved.codes, channel_dim);
      dispatch_qrelu_(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
    } else {
      std::tie(mask, codes) = ops().forward_.call(x, alpha, bits, mode, kind, saved.codes, channel_dim);
    }
  }
  torch::autograd::increment_version(x);
  set_history(x, settings, std::move(edges), x, alpha, mask, codes, /*inplace=*/true);
  return x;
}

std::tuple<Tensor, Tensor> qrelu_backward(const Tensor& grad_y, const OptionalTensor& alpha, const OptionalTensor& x,
                                          const OptionalTensor& mask, const OptionalTensor& codes, int64_t bits,
                                          int64_t ste, int64_t rounding, int64_t alpha_grad, double alpha_scale,
                                          std::optional<int64_t> channel_dim, bool need_grad_x, bool need_grad_alpha) {
  const auto requires_grad = [](const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); };
  const bool twice = at::GradMode::is_enabled() && (requires_grad(grad_y) || requires_grad(alpha) || requires_grad(x));
  std::tuple<Tensor, Tensor> out;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    out = ops().backward.call(grad_y, alpha, x, mask, codes, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim,
                              need_grad_x, need_grad_alpha);
  }
  if (!twice) return out;
  auto& [grad_x, grad_alpha] = out;
  const Settings settings{bits,
                          parse("ste", ste, kStes),
                          parse("rounding", rounding, kRoundings),
                          parse("alpha_grad", alpha_grad, kAlphaGrads),
                          alpha_scale,
                          channel_dim,
                          need_grad_x,
                          need_grad_alpha};
  if (!need_grad_alpha && !x) {
    auto node = new_node<QReluBackward>(Rule{settings, grad_y.suggest_memory_format()});
    if (mask) node->mask = SavedVariable(*mask, /*is_output=*/false);
    node->set_next_edges(torch::autograd::collect_next_edges(grad_y));
    torch::autograd::set_history(grad_x, node);
  } else {
    auto node = new_node<torch::autograd::Error>(
        "qrelu can be differentiated twice only if alpha is fixed and x is not saved for backward (ste '" +
        std::string(name_of(settings.ste, kStes)) + "', alpha_grad '" +
        std::string(name_of(settings.alpha_grad, kAlphaGrads)) + "')");
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
  return ops().qrelu.call(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
}

Tensor dispatch_qrelu_(Tensor x, const Tensor& alpha, int64_t bits, std::string_view ste, std::string_view rounding,
                       std::string_view alpha_grad, double alpha_scale, std::optional<int64_t> channel_dim) {
  return ops().qrelu_.call(x, alpha, bits, ste, rounding, alpha_grad, alpha_scale, channel_dim);
}

void register_autograd(torch::Library& library) {
  library.impl("qrelu", qrelu);
  library.impl("qrelu_", qrelu_);
  library.impl("qrelu_backward", qrelu_backward);
}

}  // namespace cg
