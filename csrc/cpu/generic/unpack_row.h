#pragma once

#include <cstdint>

namespace cg::CG_ISA {
namespace {

// A row of packed weights, one in a byte. Each set has its own, beside what it multiplies with.
void unpack_row(const uint8_t* packed, int64_t bytes, int bits, uint8_t* to);

}  // namespace
}  // namespace cg::CG_ISA
