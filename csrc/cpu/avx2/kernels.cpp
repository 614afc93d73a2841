#include "level_table.h"

#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsAvx2 = avx2::kernels("avx2", kSignedKernelsAvx2);
}
