#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsDefault = {"default", scalar::Columns::kChannels > 0, scalar::integer_layer};
}
