// One number at a time gains nothing from compare keys.
#pragma once

#include "../generic/no_compare_key.h"
#include "search_codes.h"
#include "tables.h"

namespace cg::scalar {

template <class T>
struct CompareKey : NoCompareKey {};

}  // namespace cg::scalar
