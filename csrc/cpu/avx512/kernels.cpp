#include "level_table.h"

#include "../generic/kernels.h"

namespace cg {
const Kernels kKernelsAvx512 = avx512::kernels("avx512", kSignedKernelsAvx512);
}
