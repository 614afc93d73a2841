#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsNeonDot = {"neondot", neon::Columns::kChannels > 0, neon::integer_layer};
}
