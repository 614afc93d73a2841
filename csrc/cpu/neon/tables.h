// Tables of numbers, looked up by codes.
#pragma once

#include "bits.h"

namespace cg::neon {

template <class V>
struct LargeTable {
  using A = scalar_of<V>;
  const A* entries;
  CG_HD LargeTable(const A* from, int) : entries(from) {}
  CG_HD V at(const uint8_t* codes) const {
    if constexpr (std::is_same_v<A, double>) return float64x2_t{entries[codes[0]], entries[codes[1]]};
    else return float32x4_t{entries[codes[0]], entries[codes[1]], entries[codes[2]], entries[codes[3]]};
  }
};

template <class V>
struct SmallTable {
  static constexpr int kSize = 0;
};
// By bytes: the four of an entry begin at four times its code.
template <>
struct SmallTable<Floats> {
  static constexpr int kSize = 16;
  uint8x16x4_t entries;
  CG_HD SmallTable(const float* from, int size) {
    float all[kSize];
    for (int i = 0; i < kSize; ++i) all[i] = from[i % size];
    for (int i = 0; i < 4; ++i) entries.val[i] = load<uint8x16_t>(all + 4 * i);
  }
  CG_HD Floats at(const uint8_t* codes) const {
    const uint8x16_t of_lane = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t byte = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8x16_t four = vreinterpretq_u8_u32(vdupq_n_u32(load<uint32_t>(codes)));
    const uint8x16_t index = vshlq_n_u8(vqtbl1q_u8(four, of_lane), 2) | byte;
    return vreinterpretq_f32_u8(vqtbl4q_u8(entries, index));
  }
};

template <class V>
constexpr bool kAddsWeighed = false;

}  // namespace cg::neon
