#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsNeonI8mm = {"neoni8mm", neon::Columns::kChannels > 0, neon::integer_layer};
}
