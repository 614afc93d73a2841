// A matrix of bytes, transposed: images between channels first and channels last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace cg {

constexpr int64_t kByteBlock = 16;  // rows and columns that are transposed at a time

namespace transpose_detail {

using Bytes = uint8_t __attribute__((vector_size(kByteBlock)));

template <int kFirst, int... kEach>
Bytes interleaved(Bytes a, Bytes b, std::integer_sequence<int, kEach...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kFirst + kEach / 2 + kEach % 2 * int{kByteBlock})...);
#else
  return __builtin_shuffle(a, b, Bytes{static_cast<uint8_t>(kFirst + kEach / 2 + kEach % 2 * int{kByteBlock})...});
#endif
}

inline void transpose_block(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  constexpr int kHalf = kByteBlock / 2;
  constexpr std::make_integer_sequence<int, kByteBlock> each;
  Bytes v[kByteBlock], next[kByteBlock];
  for (int64_t i = 0; i < kByteBlock; ++i) memcpy(&v[i], from + i * from_stride, sizeof(Bytes));
  // The bits of a byte's place, those of its row and then of its column, rotate by one: after four times they have
  // changed places.
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleaved<0>(v[i], v[i + kHalf], each);
      next[2 * i + 1] = interleaved<kHalf>(v[i], v[i + kHalf], each);
    }
    std::copy(next, next + kByteBlock, v);
  }
  for (int64_t i = 0; i < kByteBlock; ++i) memcpy(to + i * to_stride, &v[i], sizeof(Bytes));
}

}  // namespace transpose_detail

// to[c, r] = from[r, c] of the rows from `row` on, up to kByteBlock of them.
inline void transpose_rows(const uint8_t* from, int64_t rows, int64_t columns, int64_t row, uint8_t* to) {
  if (rows < kByteBlock || columns < kByteBlock) {
    for (int64_t r = row; r < std::min(row + kByteBlock, rows); ++r) {
      for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    }
    return;
  }
  row = std::min(row, rows - kByteBlock);  // the last blocks overlap those before
  for (int64_t column = 0; column < columns; column += kByteBlock) {
    const int64_t c = std::min(column, columns - kByteBlock);
    transpose_detail::transpose_block(from + row * columns + c, columns, to + c * rows + row, rows);
  }
}

}  // namespace cg
