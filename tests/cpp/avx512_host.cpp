// The CPU kernels of AVX-512 by avx512_host_floats.h, for a machine without it.
#include "avx512_host_floats.h"

#include "cpu/avx512/integer.cpp"
#include "cpu/avx512/signed.cpp"
// The kernels of a set have those of signed staircases.
#include "cpu/avx512/kernels.cpp"
