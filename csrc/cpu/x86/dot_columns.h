// Products of codes and weights across channels: a lane of a register has four weights of one channel, and all lanes
// meet the same four codes of a row. Sums need no adding up across lanes, and a row may be in pieces, but weights have
// to be brought into that order first, which pays where many rows share them. In 16 bits, into which both are brought
// then, four weights of a channel are two lanes. A set's dot.h says how products are added, in dot_columns.
#pragma once

#include <type_traits>

#include "dot.h"
#include "wide.h"

#include "../generic/columns.h"

namespace cg::CG_ISA {
namespace {

constexpr int kLanes = sizeof(Register) / sizeof(int32_t);
// Sums are kept in registers, of which there are 16, or 32 of the larger ones. In 16 bits four registers of weights
// meet a row, too many to keep, but read from memory where they are multiplied they need none.
constexpr int kColumnRegisters = 2;
template <class Products>
constexpr int kBytes = Products::kWide ? 2 : 1;  // of a number that is multiplied
template <class Products, int kRegisters>
constexpr int kColumnRows = (Products::kWide ? 12 : 8) * kBlocks / (kRegisters * kBytes<Products>);
constexpr int kColumnChannels = kColumnRegisters * kLanes;
constexpr int64_t kQuadBytes = 4 * kColumnChannels;  // the weights that meet four codes of a row

// Four codes of a row in all lanes.
template <class Products>
CG_HD Register broadcast_quad(const uint8_t* codes) {
  std::conditional_t<Products::kWide, int64_t, int32_t> four;
  memcpy(&four, codes, sizeof(four));
  if constexpr (Products::kWide) return broadcast_int64(four);
  else return CG_MM(set1_epi32)(four);
}

// After `last` was computed, which keeps g++ from loading weights once for all rows, and codes early.
CG_HD void read_again(const uint8_t*& weights, Register& code, Register& last) {
#if defined(__AVX512F__)
  asm("" : "+r"(weights), "+v"(code), "+v"(last));
#else
  if constexpr (kBlocks == 1) asm("" : "+r"(weights), "+x"(code), "+x"(last));
#endif
}

// to[r][c] = or += the products of four codes of each row, which are the i-th of those at `quad`.
template <class Products, bool kFirst, int kRows, int kRegisters>
CG_HD void add_quad(const uint8_t* const (&rows)[kRows], int64_t quad, int i, const uint8_t*& weights,
                    Register (&to)[kRows][kRegisters]) {
  const auto load = [&](int c) __attribute__((always_inline)) {
    return load_register(weights + i * kQuadBytes * kBytes<Products> + c * sizeof(Register));
  };
  Register w[kRegisters];
  for (int c = 0; c < kRegisters && !Products::kWide; ++c) w[c] = in_register(load(c));
  for (int r = 0; r < kRows; ++r) {
    Register code = in_register(broadcast_quad<Products>(rows[r] + 4 * kBytes<Products> * (quad + i)));
    if constexpr (Products::kWide) read_again(weights, code, to[(r + kRows - 1) % kRows][kRegisters - 1]);
    for (int c = 0; c < kRegisters; ++c) {
      const Register weight = Products::kWide ? load(c) : w[c];
      if constexpr (kFirst) to[r][c] = in_register(Products::multiply(code, weight));
      else to[r][c] = in_register(Products::add(to[r][c], code, weight));
    }
  }
}

// sums += the products of 4 * kCount codes of each row.
template <class Products, int kCount, int kRows, int kRegisters>
CG_HD void add_quads(const uint8_t* const (&rows)[kRows], int64_t quad, const uint8_t*& weights,
                     Register (&sums)[kRows][kRegisters]) {
  if constexpr (Products::kNarrow) {
    constexpr int kAtOnce = std::min(kCount, Products::kAtOnce);
    Register narrow[kRows][kRegisters];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i % kAtOnce == 0) add_quad<Products, true>(rows, quad, i, weights, narrow);
      else add_quad<Products, false>(rows, quad, i, weights, narrow);
      if ((i + 1) % kAtOnce != 0) continue;
      for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kRegisters; ++c) sums[r][c] = Products::widen(sums[r][c], narrow[r][c]);
      }
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) add_quad<Products, false>(rows, quad, i, weights, sums);
  }
}

// `count` rows, of at most as many as leave sums for so many registers of channels.
template <class Products, int kRegisters>
__attribute__((noinline)) void dot_columns_tile(const ColumnPanel& a, const uint8_t* const* from, int64_t count,
                                                int64_t first_code, int32_t* acc) {
  constexpr int kRows = kColumnRows<Products, kRegisters>;
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = from[std::min<int64_t>(r, count - 1)] + first_code;
  const uint8_t* weights = a.weights;
  Register sums[kRows][kRegisters * kBytes<Products>] = {};
  for (int64_t piece = 0; piece < a.pieces; ++piece) {
    int64_t quad = 0;
    const auto add = [&](auto quads) __attribute__((always_inline)) {
      add_quads<Products, quads.value>(rows, quad, weights, sums);
      quad += quads.value, weights += quads.value * kQuadBytes * kBytes<Products>;
    };
    while (quad + 8 <= a.quads) add(Constant<8>{});
    if (quad + 4 <= a.quads) add(Constant<4>{});
    while (quad < a.quads) add(Constant<1>{});
    for (const uint8_t*& row : rows) row += a.piece_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, acc += a.acc_stride) {
    if (r >= count) break;
    for (int c = 0; c < kRegisters; ++c) {
      Register sum = sums[r][c];
      if constexpr (Products::kWide) sum = add_neighbors(sums[r][2 * c], sums[r][2 * c + 1]);
      int32_t* to = acc + c * kLanes;
      store_register(to, CG_MM(add_epi32)(load_register(to), sum));
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

// A part in 16 bits: its codes, which all channels share, and weights of some.
class WidePart {
 public:
  static constexpr int64_t kRows = 64, kCodes = kColumnCodes / 2;

  // Of a row that begins within the one before, as windows of neighbors do, only what that did not have.
  void widen_rows(const ColumnPanel& part, int64_t first_code) {
    const int64_t codes = 4 * part.quads;
    const uint8_t* before = nullptr;
    uint8_t* to = codes_;
    for (int64_t r = 0; r < part.rows; ++r) {
      const uint8_t* const from = part.row[r] + first_code;
      const int64_t ahead = r > 0 && from >= before && from - before < codes ? from - before : codes;
      if (r > 0) to += 2 * ahead;
      const int64_t quads = (ahead + 3) / 4, known = codes - 4 * quads;
      for (int64_t piece = 0; piece < part.pieces; ++piece) {
        widen_codes(from + known + piece * part.piece_stride, quads, to + 2 * known + piece * stride(part));
      }
      before = from, rows_[r] = to;
    }
  }
  // The part by these rows.
  ColumnPanel with_weights(ColumnPanel part) {
    widen_weights(part.weights, part.pieces * part.quads * kQuadBytes, weights_);
    part.row = rows_, part.weights = weights_, part.piece_stride = stride(part);
    return part;
  }

 private:
  static int64_t stride(const ColumnPanel& part) { return 2 * kRows * 4 * part.quads; }

  alignas(64) uint8_t weights_[2 * kCodes * kColumnChannels], codes_[2 * kCodes * kRows];
  const uint8_t* rows_[kRows];
};

template <class Products, int kRegisters>
void dot_columns_part(const ColumnPanel& part, int64_t first_code) {
  constexpr int64_t kRows = kColumnRows<Products, kRegisters>;
  for (int64_t row = 0; row < part.rows; row += kRows) {
    dot_columns_tile<Products, kRegisters>(part, part.row + row, std::min(kRows, part.rows - row), first_code,
                                           part.acc + row * part.acc_stride);
  }
}

template <class Products>
void dot_columns_by(const ColumnPanel& a) {
  const auto multiply = [](const ColumnPanel& part, int64_t first_code) {
    if (part.channels > kLanes) dot_columns_part<Products, kColumnRegisters>(part, first_code);
    else dot_columns_part<Products, 1>(part, first_code);
  };
  if constexpr (Products::kWide) {
    WidePart wide;
    ColumnPanel some = a;
    for (int64_t left = a.rows; left > 0; left -= some.rows) {
      some.rows = std::min(left, WidePart::kRows);
      for_each_part<ColumnSet, WidePart::kCodes>(some, [&](const ColumnPanel& part, int64_t first_code) {
        if (part.channels == a.channels) wide.widen_rows(part, first_code);
        multiply(wide.with_weights(part), 0);
      });
      some.row += some.rows, some.acc += some.rows * a.acc_stride;
    }
  } else {
    for_each_part<ColumnSet>(a, multiply);
  }
}

using Columns = ColumnsBy<ColumnSet>;

}  // namespace
}  // namespace cg::CG_ISA
