// The Python module. Loading it registers the kernels; what it offers itself are facts.
// Of torch's Python headers the one with the tensor's conversion: all of them take half a minute.
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of coarsegrad.";

  // Here and not in a static initialiser: kernels that do not fit the schemas, as after an update of the Python files
  // alone, are then an ImportError and not the end of the process. All of them are registered or none.
  std::vector<torch::Library> libraries;
  cg::register_cpu(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, CPU)));
#ifdef CG_HAVE_CUDA
  cg::register_cuda(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, CUDA)));
#endif
  cg::register_autograd(libraries.emplace_back(MAKE_TORCH_LIBRARY_IMPL(coarsegrad, Autograd)));
  static const std::vector<torch::Library> registered = std::move(libraries);

  m.def("isa", [] { return std::string(cg::active_kernels().isa); }, "The instruction set of the CPU kernels in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> all;
        for (const cg::Kernels* kernels : cg::usable_kernels()) all.emplace_back(kernels->isa);
        return all;
      },
      "The instruction sets this machine can use, best first.");
  m.def("set_isa", [](const std::string& name) { cg::use_isa(name); }, "Use the kernels of one of isas(); for tests.");
  m.def("qrelu", torch::wrap_pybind_function_no_gil(cg::dispatch_qrelu),
        "torch.ops.coarsegrad.qrelu in less time; not for a compiler, nor where there is a __torch_function__.");
  m.def("qrelu_", torch::wrap_pybind_function_no_gil(cg::dispatch_qrelu_), "The same of torch.ops.coarsegrad.qrelu_.");
  m.def("copy", &cg::copy_cpu, pybind11::arg("to"), pybind11::arg("from"),
        "Copies bytes with the loads, stores and threads of the CPU kernels; what benchmarks measure these by.");
  m.def("stes", [] { return names(cg::kStes); }, "The coarse gradients compiled in.");
  m.def("alpha_grads", [] { return names(cg::kAlphaGrads); }, "The rules for alpha's gradient compiled in.");
}
