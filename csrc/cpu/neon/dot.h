// Products of codes and weights along rows, and of channels by themselves.
#pragma once

#include "depthwise.h"
#include "dot_rows.h"

namespace cg::neon {
namespace {

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  dot_panel_by_rows<kWeightBits>(a);
}

using Columns = NoColumns;

}  // namespace
}  // namespace cg::neon
