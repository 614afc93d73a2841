// Products of codes and weights along rows, across channels, and of channels by themselves.
#pragma once

#include "depthwise.h"
#include "dot_columns.h"

namespace cg::neon {
namespace {

template <int kWeightBits>
void dot_panel(const DotPanel& a) {
  dot_panel_by_rows<kWeightBits>(a);
}

}  // namespace
}  // namespace cg::neon
