// What is multiplied at a time.
#pragma once

#include "../../dispatch.h"
#include "../integer.h"

namespace cg {

// Codes of a panel stay in the L2 cache, and weights are read once for all of its rows.
constexpr int64_t kPanelBytes = 96 << 10, kMinPanelRows = 16, kMaxPanelRows = 32;
constexpr int64_t kMaxPanelCodes = kPanelBytes / kMinPanelRows + 8 * kWeightBlock;  // in a row
static_assert(kMaxPanelCodes * 255 * 128 < int64_t{1} << 31);

// acc[r, c] += the product of row r of codes and row c of weights, `blocks` blocks of each. No sum of |codes * weights|
// times 128 reaches 2^31.
struct DotPanel {
  const uint8_t* codes;  // below 1 << bits
  int64_t code_stride, rows;
  int bits;
  const uint8_t* weights;
  int64_t weight_stride, channels, blocks;
  int32_t* acc;
  int64_t acc_stride;
};

// acc[r, c] += the same of rows in pieces, by weights in the order that the set takes them in.
struct ColumnPanel {
  const uint8_t* const* row;  // the first code of each
  int64_t rows, pieces, piece_stride, quads;
  int bits, weight_bits;
  const uint8_t* weights;
  int64_t channels;
  int32_t* acc;
  int64_t acc_stride;  // a multiple of what channels are rounded up to
};

// A set that cannot multiply across channels.
struct NoColumns {
  static constexpr int64_t kChannels = 0;
};

// A block of packed weights has 32 in each of its 8 / kWeightBits planes.
template <int kWeightBits>
constexpr int kPlanes = 8 / kWeightBits;

}  // namespace cg
