#include <type_traits>
#include <vector>

#include "kernels.h"

#define CG_ISA isa_default
#define CG_ANY_STEPS 1  // the bisection runs one number at a time, so only here
#include "pack_scalar.h"
#include "kernels.inl"

namespace cg {
const Kernels kKernelsDefault = {"default", CG_ISA::forward, CG_ISA::backward, CG_ISA::dequantize, CG_ISA::times_slopes, CG_ISA::copy};
}
