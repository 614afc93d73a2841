// Products of codes and weights across channels: a lane of a register has four weights of one channel, and all lanes
// meet the same four codes of a row. Sums need no adding up across lanes, and a row may be in pieces, but weights have
// to be brought into that order first, which pays where many rows share them. A set's dot.h says how products are
// added, in dot_columns.
#pragma once

#include "dot.h"

#include "../generic/columns.h"

namespace cg::CG_ISA {
namespace {

constexpr int kLanes = sizeof(Register) / sizeof(int32_t);
// Sums are kept in registers, of which there are 16, or 32 of the larger ones.
constexpr int kColumnRegisters = 2, kColumnSums = 8 * kBlocks;
constexpr int kColumnChannels = kColumnRegisters * kLanes;
constexpr int64_t kQuadBytes = 4 * kColumnChannels;  // the weights that meet four codes of a row

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
                                                int64_t first_code, int32_t* acc) {
  constexpr int kRows = kColumnSums / kRegisters;
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = from[std::min<int64_t>(r, count - 1)] + first_code;
  const uint8_t* weights = a.weights;
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

void dot_columns(const ColumnPanel& a);

struct ColumnSet {
  static constexpr int64_t kChannels = kColumnChannels, kQuads = 1;

  static void order(const uint8_t* unpacked, int64_t stride, int64_t pieces, int64_t piece_codes, uint8_t* to) {
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
  static void dot(const ColumnPanel& a) { dot_columns(a); }
};

template <class Products>
void dot_columns_by(const ColumnPanel& a) {
  for_each_part<ColumnSet>(a, [](const ColumnPanel& part, int64_t first_code) {
    const auto multiply = [&](auto registers) {
      constexpr int kRows = kColumnSums / registers.value;
      for (int64_t row = 0; row < part.rows; row += kRows) {
        dot_columns_tile<Products, registers.value>(part, part.row + row, part.rows - row, first_code,
                                                    part.acc + row * part.acc_stride);
      }
    };
    if (part.channels > kLanes) multiply(Constant<kColumnRegisters>{});
    else multiply(Constant<1>{});
  });
}

using Columns = ColumnsBy<ColumnSet>;

}  // namespace
}  // namespace cg::CG_ISA
