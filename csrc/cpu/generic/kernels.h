// The kernels of the instruction set whose kernels.cpp includes this.
#pragma once

#include "backward.h"
#include "concepts.h"
#include "copy.h"
#include "dequantize.h"
#include "forward.h"
#include "slopes.h"
#include "unpack_codes.h"

namespace cg::CG_ISA {
namespace {

constexpr Kernels kernels(const char* isa, const SignedKernels& signed_kernels) {
  return {isa, forward, backward, dequantize, backward_from_slopes, unpack_codes, copy, signed_kernels};
}

}  // namespace
}  // namespace cg::CG_ISA
