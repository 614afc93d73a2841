// Which instruction set's kernels run: the best one that this machine has and that torch itself would use.
#pragma once

#include <string_view>
#include <vector>

#include "integer.h"
#include "kernels.h"

namespace cg {

// K: Kernels or IntegerKernels.
template <class K>
const K& active_kernels();
template <class K>
std::vector<const K*> usable_kernels();  // best first
template <class K>
void use_isa(std::string_view name);  // for tests; throws if the machine lacks it

}  // namespace cg
