#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsAvx512Vnni = {"avx512vnni", avx512::Columns::kChannels > 0, avx512::integer_layer};
}
