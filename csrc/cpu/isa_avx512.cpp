#include <type_traits>
#include <vector>

#include "kernels.h"

#define CG_ISA isa_avx512
#define CG_ANY_STEPS 0
#include "ordered_avx512.h"
#include "kernels.inl"

namespace cg {
const Kernels kKernelsAvx512 = {"avx512", CG_ISA::forward, CG_ISA::backward, CG_ISA::dequantize, CG_ISA::times_slopes, CG_ISA::copy};
}
