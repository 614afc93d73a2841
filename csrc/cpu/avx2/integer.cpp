#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsAvx2 = {"avx2", avx2::Columns::kChannels > 0, avx2::integer_layer};
}
