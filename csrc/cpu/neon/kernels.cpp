#include "compare_key.h"

#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsNeon = neon::kernels("neon", kSignedKernelsNeon);
}
