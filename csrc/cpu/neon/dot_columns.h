// Products of codes and weights across channels: a lane of a register has four weights of one channel, and all lanes
// meet the same four codes of a row. Sums need no adding up across lanes, and a row may be in pieces, but weights have
// to be brought into that order first, which pays where many rows share them.
#pragma once

#include "dot_rows.h"

#include "../generic/columns.h"

namespace cg::neon {
namespace {

#if defined(CG_DOT_FOURS)
constexpr int kColumnRegisters = 4;  // of weights
#else
constexpr int kColumnRegisters = 2;
#endif
constexpr int kColumnChannels = 4 * kColumnRegisters;
constexpr int64_t kQuadBytes = 4 * kColumnChannels;  // the weights that meet four codes of a row

// Shifted codes are less by 128, as in dot_rows.h.
template <bool kShifted>
CG_HD uint8x16_t shifted(uint8x16_t codes) {
  return kShifted ? codes ^ uint8_t{0x80} : codes;
}
template <bool kShifted>
CG_HD uint8x16_t load_quad(const uint8_t* codes) {
  uint32_t four;
  memcpy(&four, codes, sizeof(four));
  return shifted<kShifted>(vreinterpretq_u8_u32(vdupq_n_u32(four)));
}

// What Products are: ways to add the products of four codes of kRows rows and kRegisters of weights.
//   kParts: registers of sums for one of weights; total(sums) is that of each channel
//   kSums: that there are registers for
//   kQuads: times four codes that it adds at a time, or one
#if defined(CG_DOT_FOURS)
struct FourProducts {
  static constexpr int kParts = 1, kSums = 16, kQuads = 4;

  static CG_HD int32x4_t total(const int32x4_t (&sums)[1]) { return sums[0]; }

  template <bool kShifted, int kCount, int kRows, int kRegisters>
  static CG_HD void add(const uint8_t* const (&rows)[kRows], int64_t at, const uint8_t* weights,
                        int32x4_t (&sums)[kRows][kRegisters][kParts]) {
    uint8x16_t code[kRows];
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kCount == 1) code[r] = load_quad<kShifted>(rows[r] + at);
      else code[r] = shifted<kShifted>(load<uint8x16_t>(rows[r] + at));
    }
    for_each_plane<kCount>([&](auto quad) __attribute__((always_inline)) {
      for (int c = 0; c < kRegisters; ++c) {
        const int8x16_t w = load<int8x16_t>(weights + quad.value * kQuadBytes + 16 * c);
        for (int r = 0; r < kRows; ++r) sums[r][c][0] = add_quad<quad.value>(sums[r][c][0], code[r], w);
      }
    });
  }

 private:
  template <int kQuad>
  static CG_HD int32x4_t add_quad(int32x4_t sums, uint8x16_t codes, int8x16_t weights) {
    return vdotq_laneq_s32(sums, weights, vreinterpretq_s8_u8(codes), kQuad);
  }
};

#else
// Those of two channels in a register of 16 bits; kAtOnce times four of them cannot overflow.
template <int kAtOnce>
struct NarrowProducts {
  static constexpr int kParts = 2, kSums = 6, kQuads = 8;

  static CG_HD int32x4_t total(const int32x4_t (&sums)[2]) { return vpaddq_s32(sums[0], sums[1]); }

  template <bool kShifted, int kCount, int kRows, int kRegisters>
  static CG_HD void add(const uint8_t* const (&rows)[kRows], int64_t at, const uint8_t* weights,
                        int32x4_t (&sums)[kRows][kRegisters][kParts]) {
    uint32x4_t code[kRows];
    int16x8_t narrow[kRows][kRegisters][2];
    for_each_plane<kCount>([&](auto quad) __attribute__((always_inline)) {
      constexpr int kQuad = quad.value;
      constexpr bool kFirst = kQuad % kAtOnce == 0, kLast = (kQuad + 1) % kAtOnce == 0 || kQuad + 1 == kCount;
      int8x16_t w[kRegisters];
      for (int c = 0; c < kRegisters; ++c) w[c] = load<int8x16_t>(weights + kQuad * kQuadBytes + 16 * c);
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kCount == 1) code[r] = vreinterpretq_u32_u8(load_quad<kShifted>(rows[r] + at));
        else if (kQuad % 4 == 0) {
          code[r] = vreinterpretq_u32_u8(shifted<kShifted>(vld1q_u8(rows[r] + at + 4 * kQuad)));
          asm("" : "+w"(code[r]));  // g++ would load each four by itself, which takes two instructions
        }
        const int8x16_t four = vreinterpretq_s8_u32(vdupq_laneq_u32(code[r], kQuad % 4));
        for (int c = 0; c < kRegisters; ++c) {
          int16x8_t(&to)[2] = narrow[r][c];
          if constexpr (kFirst) {
            to[0] = vmull_s8(vget_low_s8(four), vget_low_s8(w[c])), to[1] = vmull_high_s8(four, w[c]);
          } else {
            to[0] = vmlal_s8(to[0], vget_low_s8(four), vget_low_s8(w[c])), to[1] = vmlal_high_s8(to[1], four, w[c]);
          }
          if constexpr (kLast) {
            for (int i = 0; i < 2; ++i) sums[r][c][i] = vpadalq_s16(sums[r][c][i], to[i]);
          }
        }
      }
    });
  }
};
#endif

// The first `count` of as many rows as there are sums for. plus: added to each channel of a row.
template <class Products, bool kShifted, int kRegisters>
__attribute__((noinline)) void dot_columns_tile(const ColumnPanel& a, const uint8_t* const* from, int64_t count,
                                                int64_t first_code, const int32x4_t* plus, int32_t* acc) {
  constexpr int kRows = Products::kSums / kRegisters;
  const uint8_t* weights = a.weights;
  const uint8_t* rows[kRows];
  int32x4_t sums[kRows][kRegisters][Products::kParts];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = from[std::min<int64_t>(r, count - 1)] + first_code;
    for (auto& parts : sums[r]) {
      for (int32x4_t& sum : parts) sum = vdupq_n_s32(0);
    }
  }
  int64_t piece = 0;
  do {  // at least one: g++ would keep the zeros in memory for none
    int64_t quad = 0;
    const auto add = [&](auto quads) __attribute__((always_inline)) {
      Products::template add<kShifted, quads.value>(rows, 4 * quad, weights, sums);
      quad += quads.value, weights += quads.value * kQuadBytes;
    };
    while (quad + Products::kQuads <= a.quads) add(Constant<Products::kQuads>{});
    while (quad < a.quads) add(Constant<1>{});
    for (const uint8_t*& row : rows) row += a.piece_stride;
  } while (++piece < a.pieces);
  for_each_plane<kRows>([&](auto row) __attribute__((always_inline)) {  // a loop would keep sums in memory
    constexpr int kRow = row.value;
    if (kRow >= count) return;
    for (int c = 0; c < kRegisters; ++c) {
      int32_t* const to = acc + kRow * a.acc_stride + 4 * c;
      int32x4_t sum = load<int32x4_t>(to) + Products::total(sums[kRow][c]);
      if constexpr (kShifted) sum += plus[c];
      store(to, sum);
    }
  });
}

struct ColumnSet {
  static constexpr int64_t kChannels = kColumnChannels, kQuads = 1;

  static void order(const uint8_t* unpacked, int64_t stride, int64_t pieces, int64_t piece_codes, uint8_t* to) {
    const int64_t quads = (piece_codes + 3) / 4;
    const uint32x4_t last = vdupq_n_u32(0xffffffffu >> (8 * (4 * quads - piece_codes)));
    for (int64_t piece = 0; piece < pieces; ++piece, unpacked += piece_codes, to += quads * kQuadBytes) {
      for (int64_t quad = 0; quad < quads; quad += 4) {
        for (int c = 0; c < kColumnRegisters; ++c) {
          uint32x4_t v[4];
          for (int i = 0; i < 4; ++i) v[i] = load<uint32x4_t>(unpacked + (4 * c + i) * stride + 4 * quad);
          transpose(v);
          for (int64_t i = 0; i < std::min<int64_t>(4, quads - quad); ++i) {
            if (quad + i == quads - 1) v[i] &= last;
            store(to + (quad + i) * kQuadBytes + 16 * c, v[i]);
          }
        }
      }
    }
  }

  static void dot(const ColumnPanel& a);

 private:
  static CG_HD void transpose(uint32x4_t (&v)[4]) {
    const auto pair = [](uint32x4_t a, uint32x4_t b, bool upper) __attribute__((always_inline)) {
      const uint64x2_t x = vreinterpretq_u64_u32(a), y = vreinterpretq_u64_u32(b);
      return vreinterpretq_u32_u64(upper ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y));
    };
    const uint32x4_t even[2] = {vtrn1q_u32(v[0], v[1]), vtrn1q_u32(v[2], v[3])};
    const uint32x4_t odd[2] = {vtrn2q_u32(v[0], v[1]), vtrn2q_u32(v[2], v[3])};
    v[0] = pair(even[0], even[1], false), v[2] = pair(even[0], even[1], true);
    v[1] = pair(odd[0], odd[1], false), v[3] = pair(odd[0], odd[1], true);
  }
};

template <class Products, bool kShifted>
void dot_columns_by(const ColumnPanel& a) {
  for_each_part<ColumnSet>(a, [](const ColumnPanel& part, int64_t first_code) {
    int32x4_t plus[kColumnRegisters] = {};
    for (int64_t i = 0; kShifted && i < part.pieces * part.quads * kColumnRegisters; ++i) {
      const int16x8_t pairs = vpaddlq_s8(load<int8x16_t>(part.weights + 16 * i));
      plus[i % kColumnRegisters] = vpadalq_s16(plus[i % kColumnRegisters], pairs);
    }
    for (int32x4_t& sum : plus) sum = vshlq_n_s32(sum, 7);
    const auto multiply = [&](auto registers) {
      constexpr int kRows = Products::kSums / registers.value;
      for (int64_t row = 0; row < part.rows; row += kRows) {
        dot_columns_tile<Products, kShifted, registers.value>(part, part.row + row, part.rows - row, first_code, plus,
                                                              part.acc + row * part.acc_stride);
      }
    };
    if (part.channels > kColumnChannels / 2) multiply(Constant<kColumnRegisters>{});
    else multiply(Constant<kColumnRegisters / 2>{});
  });
}

void ColumnSet::dot(const ColumnPanel& a) {
#if defined(CG_DOT_FOURS)
  if (a.bits == 8) dot_columns_by<FourProducts, true>(a);
  else dot_columns_by<FourProducts, false>(a);
#else
  const int largest = a.bits == 8 ? 128 : (1 << a.bits) - 1;
  const int at_once = 32767 / (largest * (1 << (a.weight_bits - 1)));
  if (a.bits == 8) {
    if (at_once >= 8) dot_columns_by<NarrowProducts<8>, true>(a);
    else dot_columns_by<NarrowProducts<1>, true>(a);
  } else {
    if (at_once >= 8) dot_columns_by<NarrowProducts<8>, false>(a);
    else if (at_once >= 4) dot_columns_by<NarrowProducts<4>, false>(a);
    else dot_columns_by<NarrowProducts<2>, false>(a);
  }
#endif
}

using Columns = ColumnsBy<ColumnSet>;

}  // namespace
}  // namespace cg::neon
