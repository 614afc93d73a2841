// Products of codes and weights across channels by USMMLA: a register has eight weights of each of two channels, and
// meets eight codes of each of two rows.
#pragma once

#include "../neon/unpack_weights.h"

#include "../generic/columns.h"

namespace cg::neon {
namespace {

// Of rows and of channels: sums take 16 of 32 registers.
constexpr int kColumnPairs = 4;
constexpr int kColumnRows = 2 * kColumnPairs, kColumnChannels = 2 * kColumnPairs;
constexpr int64_t kOctBytes = 8 * kColumnChannels;  // the weights that meet eight codes of a row

// kCodes of the row one, eight at a time, and the same of the other: the last four of a piece, or 8 or 16.
template <int kCodes>
CG_HD void load_pair(const uint8_t* one, const uint8_t* other, uint8x16_t (&to)[(kCodes + 7) / 8]) {
  if constexpr (kCodes == 4) {
    uint32_t a, b;
    memcpy(&a, one, sizeof(a));
    memcpy(&b, other, sizeof(b));
    to[0] = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(a), vcreate_u64(b)));
  } else if constexpr (kCodes == 8) {
    to[0] = vcombine_u8(vld1_u8(one), vld1_u8(other));
  } else {
    const uint64x2_t a = vreinterpretq_u64_u8(vld1q_u8(one)), b = vreinterpretq_u64_u8(vld1q_u8(other));
    to[0] = vreinterpretq_u8_u64(vzip1q_u64(a, b)), to[1] = vreinterpretq_u8_u64(vzip2q_u64(a, b));
  }
}

template <int kCodes>
CG_HD void add_codes(const uint8_t* const (&rows)[kColumnRows], int64_t at, const uint8_t* weights,
                     int32x4_t (&sums)[kColumnPairs][kColumnPairs]) {
  constexpr int kOcts = (kCodes + 7) / 8;
  uint8x16_t code[kColumnPairs][kOcts];
  for (int r = 0; r < kColumnPairs; ++r) load_pair<kCodes>(rows[2 * r] + at, rows[2 * r + 1] + at, code[r]);
  for (int oct = 0; oct < kOcts; ++oct) {
    for (int c = 0; c < kColumnPairs; ++c) {
      const int8x16_t w = load<int8x16_t>(weights + oct * kOctBytes + 16 * c);
      for (int r = 0; r < kColumnPairs; ++r) sums[r][c] = vusmmlaq_s32(sums[r][c], code[r][oct], w);
    }
  }
}

// The first `count` of kColumnRows rows.
__attribute__((noinline)) void dot_columns_tile(const ColumnPanel& a, const uint8_t* const* from, int64_t count,
                                                int64_t first_code, int32_t* acc) {
  const uint8_t* weights = a.weights;
  const uint8_t* rows[kColumnRows];
  int32x4_t sums[kColumnPairs][kColumnPairs];
  for (int r = 0; r < kColumnRows; ++r) rows[r] = from[std::min<int64_t>(r, count - 1)] + first_code;
  for (auto& pairs : sums) {
    for (int32x4_t& sum : pairs) sum = vdupq_n_s32(0);
  }
  int64_t piece = 0;
  do {
    int64_t quad = 0;
    const auto add = [&](auto codes) __attribute__((always_inline)) {
      add_codes<codes.value>(rows, 4 * quad, weights, sums);
      quad += codes.value / 4, weights += (codes.value + 7) / 8 * kOctBytes;
    };
    while (quad + 4 <= a.quads) add(Constant<16>{});
    if (quad + 2 <= a.quads) add(Constant<8>{});
    if (quad < a.quads) add(Constant<4>{});
    for (const uint8_t*& row : rows) row += a.piece_stride;
  } while (++piece < a.pieces);
  for (int r = 0; r < kColumnPairs; ++r) {
    int64x2_t pairs[kColumnPairs];
    for (int c = 0; c < kColumnPairs; ++c) pairs[c] = vreinterpretq_s64_s32(sums[r][c]);
    const auto add_to_row = [&](int32_t* to, auto zip) __attribute__((always_inline)) {
      for (int c = 0; c < kColumnPairs; c += 2) {
        store(to + 2 * c, load<int32x4_t>(to + 2 * c) + vreinterpretq_s32_s64(zip(pairs[c], pairs[c + 1])));
      }
    };
    if (2 * r < count) add_to_row(acc + 2 * r * a.acc_stride, [](auto x, auto y) { return vzip1q_s64(x, y); });
    if (2 * r + 1 < count) {
      add_to_row(acc + (2 * r + 1) * a.acc_stride, [](auto x, auto y) { return vzip2q_s64(x, y); });
    }
  }
}

struct ColumnSet {
  static constexpr int64_t kChannels = kColumnChannels, kQuads = 2;

  static void order(const uint8_t* unpacked, int64_t stride, int64_t pieces, int64_t piece_codes, uint8_t* to) {
    const int64_t octs = (piece_codes + 7) / 8;
    const uint8x16_t last = vreinterpretq_u8_u64(vdupq_n_u64(~uint64_t{0} >> (8 * (8 * octs - piece_codes))));
    for (int64_t piece = 0; piece < pieces; ++piece, unpacked += piece_codes) {
      for (int64_t oct = 0; oct < octs; ++oct, to += kOctBytes) {
        for (int c = 0; c < kColumnPairs; ++c) {
          const uint8_t* const from = unpacked + 2 * c * stride + 8 * oct;
          uint8x16_t v = vcombine_u8(vld1_u8(from), vld1_u8(from + stride));
          if (oct == octs - 1) v &= last;
          store(to + 16 * c, v);
        }
      }
    }
  }

  static void dot(const ColumnPanel& a) {
    for_each_part<ColumnSet>(a, [](const ColumnPanel& part, int64_t first_code) {
      for (int64_t row = 0; row < part.rows; row += kColumnRows) {
        dot_columns_tile(part, part.row + row, part.rows - row, first_code, part.acc + row * part.acc_stride);
      }
    });
  }
};

using Columns = ColumnsBy<ColumnSet>;

}  // namespace
}  // namespace cg::neon
