// Which instruction set's kernels run: the best one that this machine has and that torch itself would use.
#pragma once

#include <string_view>
#include <vector>

#include "kernels.h"

namespace cg {

const Kernels& active_kernels();
std::vector<const Kernels*> usable_kernels();  // best first
void use_isa(std::string_view name);           // for tests; throws if the machine lacks it

}  // namespace cg
