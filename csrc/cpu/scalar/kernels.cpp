#include "compare_key.h"

#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsDefault = scalar::kernels("default", kSignedKernelsDefault);
}
