#include <type_traits>
#include <vector>

#include "../kernels.h"

#define CG_ISA scalar
#define CG_ANY_ALPHA 1  // the bisection runs one number at a time, so only here
#include "vec.h"
#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsDefault = {"default", CG_ISA::forward, CG_ISA::backward, CG_ISA::dequantize, CG_ISA::times_slopes, CG_ISA::copy};
}
