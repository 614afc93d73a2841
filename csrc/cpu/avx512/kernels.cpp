#include <type_traits>
#include <vector>

#include "../kernels.h"

#define CG_ISA avx512
#define CG_ANY_ALPHA 0
#include "compare_key.h"
#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsAvx512 = {"avx512", CG_ISA::forward, CG_ISA::backward, CG_ISA::dequantize, CG_ISA::times_slopes, CG_ISA::copy};
}
