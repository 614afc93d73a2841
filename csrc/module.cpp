// The Python module. Loading it registers the kernels; its functions are the fast entry to qrelu, and facts.
// Only the headers for converting tensors: all of torch's Python headers take half a minute to compile.
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "register.h"

namespace {

template <class E, size_t N>
std::vector<std::string> names(const cg::Named<E> (&known)[N]) {
  std::vector<std::string> all;
  for (const auto& entry : known) all.emplace_back(entry.name);
  return all;
}

// The instruction sets of the kernels K.
template <class K>
void def_isa(pybind11::module_& m, const std::string& prefix) {
  m.def((prefix + "isa").c_str(), [] { return std::string(cg::active_kernels<K>().isa); },
        "The instruction set of the CPU kernels in use.");
  m.def((prefix + "isas").c_str(),
        [] {
          std::vector<std::string> all;
          for (const K* kernels : cg::usable_kernels<K>()) all.emplace_back(kernels->isa);
          return all;
        },
        "The instruction sets this machine can use, best first.");
  m.def(("set_" + prefix + "isa").c_str(), [](const std::string& name) { cg::use_isa<K>(name); },
        "Use the kernels of one of them; for tests.");
}

}  // namespace

#ifdef __GLIBC__
// Since glibc 2.32 g++'s shared_ptr does without atomics while this says that there is one thread. Our own says that
// there may be more, and then a wheel that is built today needs no newer glibc than torch's wheels do, 2.28.
extern "C" {
char __libc_single_threaded = 0;
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of coarsegrad.";

  // Not in a static initialiser: kernels that do not match the schemas, as after an update of only the Python files,
  // are then an ImportError instead of a crash. Either all are registered or none.
  std::vector<torch::Library> libraries;
  cg::register_cpu(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, CPU)));
  cg::register_integer_cpu(libraries.back());
  cg::register_signed_cpu(libraries.back());
  cg::register_weights_cpu(libraries.back());
#ifdef CG_HAVE_CUDA
  cg::register_cuda(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, CUDA)));
  cg::register_signed_cuda(libraries.back());
  cg::register_weights_cuda(libraries.back());
#endif
  cg::register_autograd(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, Autograd)));
  static const std::vector<torch::Library> registered = std::move(libraries);

  def_isa<cg::Kernels>(m, "");
  def_isa<cg::IntegerKernels>(m, "integer_");
  m.def("qrelu", torch::wrap_pybind_function_no_gil(cg::dispatch_qrelu),
        "torch.ops.coarsegrad.qrelu in less time. Not for a compiler or arguments with a __torch_function__.");
  m.def("qrelu_", torch::wrap_pybind_function_no_gil(cg::dispatch_qrelu_), "The same for torch.ops.coarsegrad.qrelu_.");
  m.def("copy", &cg::copy_cpu, pybind11::arg("to"), pybind11::arg("from"),
        "Copies bytes with the loads, stores and threads of the CPU kernels: the yardstick of benchmarks.");
  // The names of enumerators, by number: what python/coarsegrad/_types.py must list.
  m.def("stes", [] { return names(cg::kStes); }, "The coarse gradients compiled in.");
  m.def("roundings", [] { return names(cg::kRoundings); }, "The roundings.");
  m.def("alpha_grads", [] { return names(cg::kAlphaGrads); }, "The rules for alpha's gradient.");
  m.def("mask_kinds", [] { return names(cg::kMaskKinds); }, "The kinds of mask bits.");
}
