#include "dot.h"

#include "../generic/integer_layer.h"

namespace cg {
const IntegerKernels kIntegerKernelsAvxVnni = {"avxvnni", avx2::integer_layer};
}
