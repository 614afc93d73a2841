// Products of codes and weights across channels: a lane of a register has four weights of one channel, and all lanes
// meet the same four codes of a row. Sums need no adding up across lanes, and a row may be in pieces, but weights have
// to be brought into that order first, which pays where many rows share them. A set's dot.h says how products are
// added.
#pragma once

#include "dot.h"

namespace cg::CG_ISA {
namespace {

constexpr int kLanes = sizeof(Register) / sizeof(int32_t);
// Sums are kept in registers, of which there are 16, or 32 of the larger ones.
constexpr int kColumnRegisters = 2, kColumnSums = 8 * kBlocks;
constexpr int kColumnChannels = kColumnRegisters * kLanes;
constexpr int64_t kQuadBytes = 4 * kColumnChannels;  // the weights that meet four codes of a row

// Weights of so many codes stay in the L1 cache for all rows.
constexpr int64_t kColumnCodes = 1024;

// g++ would load it again for each product, or add up in an order that takes more registers than there are.
CG_HD Register in_register(Register v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#else
  if constexpr (kBlocks == 1) asm("" : "+x"(v));
#endif
  return v;
}

// to[r][c] = or += the products of four codes of each row.
template <class Products, bool kFirst, int kRows, int kRegisters>
CG_HD void add_quad(const uint8_t* const (&rows)[kRows], int64_t at, const uint8_t* weights,
                    Register (&to)[kRows][kRegisters]) {
  Register w[kRegisters];
  for (int c = 0; c < kRegisters; ++c) w[c] = in_register(load_register(weights + c * sizeof(Register)));
  for (int r = 0; r < kRows; ++r) {
    int32_t four;
    memcpy(&four, rows[r] + at, sizeof(four));
    const Register code = in_register(CG_MM(set1_epi32)(four));
    for (int c = 0; c < kRegisters; ++c) {
      if constexpr (kFirst) to[r][c] = in_register(Products::multiply(code, w[c]));
      else to[r][c] = in_register(Products::add(to[r][c], code, w[c]));
    }
  }
}

// sums += the products of 4 * kCount codes of each row.
template <class Products, int kCount, int kRows, int kRegisters>
CG_HD void add_quads(const uint8_t* const (&rows)[kRows], int64_t at, const uint8_t* weights,
                     Register (&sums)[kRows][kRegisters]) {
  if constexpr (Products::kNarrow) {
    constexpr int kAtOnce = std::min(kCount, Products::kAtOnce);
    Register narrow[kRows][kRegisters];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i, at += 4, weights += kQuadBytes) {
      if (i % kAtOnce == 0) add_quad<Products, true>(rows, at, weights, narrow);
      else add_quad<Products, false>(rows, at, weights, narrow);
      if ((i + 1) % kAtOnce != 0) continue;
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kRegisters; ++c) sums[r][c] = Products::widen(sums[r][c], narrow[r][c]);
      }
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) add_quad<Products, false>(rows, at + 4 * i, weights + i * kQuadBytes, sums);
  }
}

// As many rows as leave sums for so many registers of channels; the first `count` are wanted.
template <class Products, int kRegisters>
__attribute__((noinline)) void dot_columns_tile(const ColumnPanel& a, const uint8_t* const* from, int64_t count,
                                                int64_t first_code, const uint8_t* weights, int32_t* acc) {
  constexpr int kRows = kColumnSums / kRegisters;
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = from[std::min<int64_t>(r, count - 1)] + first_code;
  Register sums[kRows][kRegisters] = {};
  for (int64_t piece = 0; piece < a.pieces; ++piece) {
    int64_t quad = 0;
    const auto add = [&](auto quads) __attribute__((always_inline)) {
      add_quads<Products, quads.value>(rows, 4 * quad, weights, sums);
      quad += quads.value, weights += quads.value * kQuadBytes;
    };
    while (quad + 8 <= a.quads) add(Constant<8>{});
    if (quad + 4 <= a.quads) add(Constant<4>{});
    while (quad < a.quads) add(Constant<1>{});
    for (const uint8_t*& row : rows) row += a.piece_stride;
  }
  for (int64_t r = 0; r < std::min<int64_t>(kRows, count); ++r, acc += a.acc_stride) {
    for (int c = 0; c < kRegisters; ++c) {
      int32_t* to = acc + c * kLanes;
      store_register(to, CG_MM(add_epi32)(load_register(to), sums[r][c]));
    }
  }
}

// Parts of the rows are pieces, some of them, or a part of one.
template <class Products>
void dot_columns_by(const ColumnPanel& a) {
  if (a.quads == 0) return;
  const int64_t quads = std::min(a.quads, kColumnCodes / 4), pieces = std::max<int64_t>(1, kColumnCodes / 4 / a.quads);
  ColumnPanel part = a;
  for (int64_t channel = 0; channel < a.channels; channel += kColumnChannels) {
    const uint8_t* weights = a.weights + channel * 4 * a.quads * a.pieces;
    for (int64_t piece = 0; piece < a.pieces; piece += pieces) {
      part.pieces = std::min(pieces, a.pieces - piece);
      for (int64_t quad = 0; quad < a.quads; quad += quads) {
        part.quads = std::min(quads, a.quads - quad);
        const auto multiply = [&](auto registers) {
          for (int64_t row = 0; row < a.rows; row += kColumnSums / registers.value) {
            dot_columns_tile<Products, registers.value>(part, a.row + row, a.rows - row,
                                                        piece * a.piece_stride + 4 * quad, weights,
                                                        a.acc + row * a.acc_stride + channel);
          }
        };
        if (a.channels - channel > kLanes) multiply(Constant<kColumnRegisters>{});
        else multiply(Constant<1>{});
        weights += part.pieces * part.quads * kQuadBytes;
      }
    }
  }
}

// Weights of kColumnChannels channels in the order of dot_columns_tile, from rows of them one in a byte. What is left
// of the four at the end of a piece is zero.
void order_columns(const uint8_t* unpacked, int64_t stride, int64_t pieces, int64_t piece_codes, uint8_t* to) {
  const int64_t quads = (piece_codes + 3) / 4;
  const Register last = CG_MM(set1_epi32)(static_cast<int>(0xffffffffu >> (8 * (4 * quads - piece_codes))));
  for (int64_t piece = 0; piece < pieces; ++piece, unpacked += piece_codes, to += quads * kQuadBytes) {
    for (int64_t quad = 0; quad < quads; quad += kLanes) {
      for (int c = 0; c < kColumnRegisters; ++c) {
        Register v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load_register(unpacked + (c * kLanes + i) * stride + 4 * quad);
        transpose(v);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, quads - quad); ++i) {
          if (quad + i == quads - 1) v[i] &= last;
          store_register(to + (quad + i) * kQuadBytes + c * sizeof(Register), v[i]);
        }
      }
    }
  }
}

void dot_columns(const ColumnPanel& a);

// What integer_layer.h wants of a set that multiplies across channels.
struct Columns {
  static constexpr bool kAdds = true;
  static constexpr int64_t kChannels = kColumnChannels;

  static void order(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* weights, int64_t channels,
                    uint8_t* unpacked, uint8_t* to) {
    for (int64_t c = 0; c < channels; c += kColumnChannels, to += shape.pieces * shape.quads * kQuadBytes) {
      for (int64_t i = 0; i < kColumnChannels; ++i) {
        uint8_t* row = unpacked + i * shape.unpacked_stride;
        if (c + i < channels) unpack_row(weights + (c + i) * a.row_bytes, a.row_bytes, a.weight_bits, row);
        else memset(row, 0, shape.unpacked_stride);
      }
      order_columns(unpacked, shape.unpacked_stride, shape.pieces, shape.piece_codes, to);
    }
  }
  static void dot(const IntegerLayer& a, const ColumnShape& shape, const uint8_t* const* row, int64_t rows,
                  const uint8_t* weights, int64_t channels, int32_t* acc, int64_t acc_stride) {
    dot_columns({row, rows, shape.pieces, shape.piece_stride, shape.quads, a.bits, a.weight_bits, weights, channels,
                 acc, acc_stride});
  }
};

}  // namespace
}  // namespace cg::CG_ISA
