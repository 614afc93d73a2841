#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsAmx = {"amx", avx512::Columns::kChannels > 0, avx512::integer_layer};
}
