#include "isa.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <string>

namespace cg {

// ATEN_CPU_CAPABILITY, which holds torch down to an older instruction set, holds these kernels too.
std::vector<const Kernels*> usable_kernels() {
  const std::string capability = at::get_cpu_capability();
  std::vector<const Kernels*> usable;
#if defined(CG_HAVE_AVX512)
  if (capability.rfind("AVX512", 0) == 0) usable.push_back(&kKernelsAvx512);
#endif
#if defined(CG_HAVE_AVX2)
  // torch does not ask for the carry-less product, which every machine with AVX2 has unless a hypervisor hides it.
  if (capability.rfind("AVX", 0) == 0) usable.push_back(&kKernelsAvx2);
#endif
  usable.push_back(&kKernelsDefault);
  return usable;
}

namespace {
std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{usable_kernels().front()};
  return kernels;
}
}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

void use_isa(std::string_view name) {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    if (name == kernels->isa) {
      active().store(kernels);
      return;
    }
    names += (names.empty() ? "'" : ", '") + std::string(kernels->isa) + "'";
  }
  TORCH_CHECK_VALUE(false, "isa must be one of ", names, " on this machine, got '", name, "'");
}

}  // namespace cg
