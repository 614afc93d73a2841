#include "isa.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

#if defined(CG_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(CG_HAVE_NEON)
#include "neon/features.h"
#endif

namespace cg {
namespace {

// ATEN_CPU_CAPABILITY, which holds torch down to an older instruction set, holds these kernels too.
[[maybe_unused]] bool torch_uses(std::string_view capability) {
  return at::get_cpu_capability().rfind(capability, 0) == 0;
}

#if defined(CG_HAVE_AMX)
// Linux gives a process the registers of AMX when asked, once.
bool has_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(CG_HAVE_NEON)
// torch has no name for NEON, which it uses in any case.
bool uses_neon() {
  const char* const held = std::getenv("ATEN_CPU_CAPABILITY");
  return !held || std::string_view(held) != "default";
}
#endif

}  // namespace

template <>
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#if defined(CG_HAVE_AVX512)
  if (torch_uses("AVX512")) usable.push_back(&kKernelsAvx512);
#endif
#if defined(CG_HAVE_AVX2)
  // torch does not ask for the carry-less product, which every machine with AVX2 has unless a hypervisor hides it.
  if (torch_uses("AVX")) usable.push_back(&kKernelsAvx2);
#endif
#if defined(CG_HAVE_NEON)
  if (uses_neon()) usable.push_back(&kKernelsNeon);
#endif
  usable.push_back(&kKernelsDefault);
  return usable;
}

template <>
std::vector<const IntegerKernels*> usable_kernels() {
  std::vector<const IntegerKernels*> usable;
#if defined(CG_HAVE_AMX)
  if (torch_uses("AVX512") && has_amx()) usable.push_back(&kIntegerKernelsAmx);
#endif
#if defined(CG_HAVE_AVX512VNNI)
  if (torch_uses("AVX512") && __builtin_cpu_supports("avx512vnni")) usable.push_back(&kIntegerKernelsAvx512Vnni);
#endif
#if defined(CG_HAVE_AVX512)
  if (torch_uses("AVX512")) usable.push_back(&kIntegerKernelsAvx512);
#endif
#if defined(CG_HAVE_AVXVNNI)
  if (torch_uses("AVX") && __builtin_cpu_supports("avxvnni")) usable.push_back(&kIntegerKernelsAvxVnni);
#endif
#if defined(CG_HAVE_AVX2)
  if (torch_uses("AVX")) usable.push_back(&kIntegerKernelsAvx2);
#endif
#if defined(CG_HAVE_NEONI8MM)
  if (uses_neon() && neon::has_dot() && neon::has_i8mm()) usable.push_back(&kIntegerKernelsNeonI8mm);
#endif
#if defined(CG_HAVE_NEONDOT)
  if (uses_neon() && neon::has_dot()) usable.push_back(&kIntegerKernelsNeonDot);
#endif
#if defined(CG_HAVE_NEON)
  if (uses_neon()) usable.push_back(&kIntegerKernelsNeon);
#endif
  usable.push_back(&kIntegerKernelsDefault);
  return usable;
}

namespace {
template <class K>
std::atomic<const K*>& active() {
  static std::atomic<const K*> kernels{usable_kernels<K>().front()};
  return kernels;
}
}  // namespace

template <class K>
const K& active_kernels() {
  return *active<K>().load(std::memory_order_relaxed);
}

template <class K>
void use_isa(std::string_view name) {
  std::string names;
  for (const K* kernels : usable_kernels<K>()) {
    if (name == kernels->isa) {
      active<K>().store(kernels);
      return;
    }
    names += (names.empty() ? "'" : ", '") + std::string(kernels->isa) + "'";
  }
  TORCH_CHECK_VALUE(false, "isa must be one of ", names, " on this machine, got '", name, "'");
}

template const Kernels& active_kernels<Kernels>();
template const IntegerKernels& active_kernels<IntegerKernels>();
template void use_isa<Kernels>(std::string_view);
template void use_isa<IntegerKernels>(std::string_view);

}  // namespace cg
