#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsNeon = {"neon", neon::Columns::kChannels > 0, neon::integer_layer};
}
