// Products of codes and weights across channels: some codes of a row and as many weights of each channel at a time.
#pragma once

#include <algorithm>

#include "dot_panel.h"
#include "unpack_row.h"

namespace cg::CG_ISA {
namespace {

// Weights of so many codes stay in the L1 cache for all rows.
constexpr int64_t kColumnCodes = 1024;

// Of the weights of a piece.
template <class Set>
CG_HD int64_t weight_bytes(int64_t quads) {
  return IntegerShape::rounded(quads, Set::kQuads) * 4 * Set::kChannels;
}

// multiply(part, first_code) for all parts of a panel: as many codes of all rows as kCodes, from first_code on, which
// are some of the pieces or a part of one; and in turn with each Set's channels, of which the last may be fewer.
template <class Set, int64_t kCodes = kColumnCodes, class Body>
void for_each_part(const ColumnPanel& a, const Body& multiply) {
  if (a.quads == 0) return;
  const int64_t quads = std::min(a.quads, kCodes / 4), pieces = std::max<int64_t>(1, kCodes / 4 / a.quads);
  const int64_t piece_bytes = weight_bytes<Set>(a.quads);
  for (int64_t piece = 0; piece < a.pieces; piece += pieces) {
    for (int64_t quad = 0; quad < a.quads; quad += quads) {
      ColumnPanel part = a;
      part.pieces = std::min(pieces, a.pieces - piece), part.quads = std::min(quads, a.quads - quad);
      part.weights += piece * piece_bytes + quad * 4 * Set::kChannels;
      for (; part.channels > 0; part.channels -= Set::kChannels, part.acc += Set::kChannels) {
        multiply(part, piece * a.piece_stride + 4 * quad);
        part.weights += a.pieces * piece_bytes;
      }
    }
  }
}

// What integer_layer.h wants of a set that multiplies across channels. Of a Set:
//   kChannels, kQuads: that it multiplies at a time, the latter times four codes
//   order(...): their weights, in the order in which it takes them, from rows of them one in a byte. What is left of
//     those at the end of a piece is zero.
//   dot(panel)
template <class Set>
struct ColumnsBy {
  static constexpr bool kAdds = true;
  static constexpr int64_t kChannels = Set::kChannels;
  static_assert(ColumnShape::kMaxChannels % kChannels == 0 && ColumnShape::kMaxQuads % Set::kQuads == 0);

  static void order(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* weights, int64_t channels,
                    uint8_t* unpacked, uint8_t* to) {
    for (int64_t c = 0; c < channels; c += kChannels, to += shape.pieces * weight_bytes<Set>(shape.quads)) {
      for (int64_t i = 0; i < kChannels; ++i) {
        uint8_t* row = unpacked + i * shape.unpacked_stride;
        if (c + i < channels) unpack_row(weights + (c + i) * a.row_bytes, a.row_bytes, a.weight_bits, row);
        else memset(row, 0, shape.unpacked_stride);
      }
      Set::order(unpacked, shape.unpacked_stride, shape.pieces, shape.piece_codes, to);
    }
  }
  static void dot(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* const* row, int64_t rows,
                  const uint8_t* weights, int64_t channels, int32_t* acc, int64_t acc_stride) {
    Set::dot({row, rows, shape.pieces, shape.piece_stride, shape.quads, a.bits, a.weight_bits, weights, channels, acc,
              acc_stride});
  }
};

}  // namespace
}  // namespace cg::CG_ISA
