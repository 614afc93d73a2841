// dy to dx by a slope for each code.
#pragma once

#include "blocks.h"

namespace cg::CG_ISA {
namespace {

template <int kWidth, class T, class Table>
CG_HD void backward_from_slopes_block(const T* grad_y, const uint8_t* packed, const Table& table, T* grad_x,
                                      bool stream) {
  using V = Vec<compute_t<T>>;
  uint8_t unpacked[kBlock];
  const uint8_t* codes = packed;
  if constexpr (kWidth < 8) bitunpack<kWidth>(packed, unpacked), codes = unpacked;
  for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
    const V dx = round_for_store<T>(times_slope(Io<T>::load(grad_y + i), table.at(codes + i)));
    if (stream) Io<T>::stream(grad_x + i, dx);
    else Io<T>::store(grad_x + i, dx);
  }
}

template <int kWidth, class T, class Table>
void backward_from_slopes_of(const BackwardFromSlopes& args, int64_t begin, int64_t end) {
  const BackwardFromSlopes a = args;
  const Table table(static_cast<const compute_t<T>*>(a.slopes), 1 << a.bits);
  for (int64_t block = begin; block < end; ++block) {
    const int count = block_count(a.count, block);
    const bool whole = count == kBlock;
    uint64_t codes_copy[kWidth];
    T dy_copy[kBlock], dx_copy[kBlock];
    prefetch(static_cast<const T*>(a.grad_y) + block * kBlock);
    const uint8_t* codes = a.codes + block * 8 * kWidth;
    if (!whole) {
      read_packed<kWidth>(a.codes, block, count, codes_copy);
      codes = reinterpret_cast<const uint8_t*>(codes_copy);
    }
    const T* grad_y = read_block(static_cast<const T*>(a.grad_y), block, count, dy_copy);
    T* dx = whole ? static_cast<T*>(a.grad_x) + block * kBlock : dx_copy;
    backward_from_slopes_block<kWidth>(grad_y, codes, table, dx, whole && a.stream);
    if (!whole) memcpy(static_cast<T*>(a.grad_x) + block * kBlock, dx_copy, count * sizeof(T));
  }
}

template <int kWidth, class T>
void backward_from_slopes_width(const BackwardFromSlopes& a, int64_t begin, int64_t end) {
  using V = Vec<compute_t<T>>;
  constexpr bool kSmall = kWidth <= 4 && SmallTable<V>::kSize > 0;
  backward_from_slopes_of<kWidth, T, std::conditional_t<kSmall, SmallTable<V>, LargeTable<V>>>(a, begin, end);
}

void backward_from_slopes(const BackwardFromSlopes& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto dtype) {
    with_width(packed_width(a.bits), [&](auto width) {
      backward_from_slopes_width<width.value, typename decltype(dtype)::type>(a, begin, end);
    });
  });
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
