// The instruction set that the loops are compiled for. A set's kernels.cpp includes its compare_key.h first; a header
// of this folder by itself is compiled for the scalar set.
#pragma once

#if !defined(CG_ISA)
#include "../scalar/compare_key.h"
#endif

#include "../kernels.h"
