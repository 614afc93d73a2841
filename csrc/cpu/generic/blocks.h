// Reads and writes blocks of tensors and of packed bits.
#pragma once

#include "../../dispatch.h"
#include "instruction_set.h"

namespace cg::CG_ISA {

// Elements of a block from `first` on, zero where the block's bit is not set: a vector, or a pair in load_pair's order.
template <class T>
CG_HD auto load_where(const T* block, uint64_t bits, int first) {
  using V = Vec<compute_t<T>>;
  return select(Lanes<V>::mask(bits >> first), Io<T>::load(block + first), V(compute_t<T>(0)));
}
template <class T, class Bits>
CG_HD auto load_pair_where(const T* block, Bits bits, int first) {
  using V = Vec<compute_t<T>>;
  return Pair<V>{load_where(block, bits, first), load_where(block, bits, first + Lanes<V>::kCount)};
}

namespace {

CG_HD int block_count(int64_t count, int64_t block) {
  const int64_t left = count - block * kBlock;
  return left < kBlock ? static_cast<int>(left) : kBlock;
}

// Prefetches the block `bytes` ahead, if any is to be; harmless past the end.
template <class T>
CG_HD void prefetch(const T* block, int64_t bytes = kPrefetchBytes) {
  if constexpr (kPrefetchBytes > 0) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(block) + bytes;
    for (size_t i = 0; i < kBlock * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + i));
  }
}

// The last block may be short: it is read from a zero-padded copy, and written through one.
template <class U>
CG_HD const U* read_block(const U* from, int64_t block, int count, U* copy) {
  if (count == kBlock) return from + block * kBlock;
  for (int i = count; i < kBlock; ++i) copy[i] = U{};
  memcpy(copy, from + block * kBlock, count * sizeof(U));
  return copy;
}

// A block's kWidth bits per element begin at byte block * 8 * kWidth. Whole blocks are copied with a size known to the
// compiler: a few moves instead of a call.
template <int kWidth>
CG_HD void write_packed(uint8_t* to, int64_t block, int count, const uint64_t* words) {
  to += block * 8 * kWidth;
  if (count == kBlock) memcpy(to, words, 8 * kWidth);
  else memcpy(to, words, packed_bytes(count, kWidth));
}
template <int kWidth>
CG_HD void read_packed(const uint8_t* from, int64_t block, int count, uint64_t* words) {
  from += block * 8 * kWidth;
  if (count == kBlock) {
    memcpy(words, from, 8 * kWidth);
  } else {
    memset(words, 0, 8 * kWidth);
    memcpy(words, from, packed_bytes(count, kWidth));
  }
}

CG_HD void write_mask(uint8_t* to, MaskKind kind, int64_t block, int count, uint64_t inside, uint64_t above,
                      uint64_t near) {
  if (kind == MaskKind::state) {
    uint64_t words[2];
    bitpack_states(inside, above, words);
    write_packed<2>(to, block, count, words);
  } else {
    if (kind == MaskKind::positive) inside |= above;
    if (kind == MaskKind::near) inside = near & (~uint64_t{0} >> (kBlock - count));  // the zeros behind x are near
    write_packed<1>(to, block, count, &inside);
  }
}

template <int kWidth>
CG_HD void write_codes_of(uint8_t* to, int64_t block, int count, const uint8_t* codes) {
  if (count == kBlock) return bitpack<kWidth>(codes, to + block * 8 * kWidth);
  uint64_t words[kWidth];
  bitpack<kWidth>(codes, reinterpret_cast<uint8_t*>(words));
  write_packed<kWidth>(to, block, count, words);
}
template <int kWidth>
CG_HD void read_codes_of(const uint8_t* from, int64_t block, int count, uint8_t* codes) {
  if (count == kBlock) return bitunpack<kWidth>(from + block * 8 * kWidth, codes);
  uint64_t words[kWidth];
  read_packed<kWidth>(from, block, count, words);
  bitunpack<kWidth>(reinterpret_cast<const uint8_t*>(words), codes);
}

void write_codes(uint8_t* to, int64_t block, int count, int width, const uint8_t* codes) {
  with_width(width, [&](auto width) { write_codes_of<width.value>(to, block, count, codes); });
}
void read_codes(const uint8_t* from, int64_t block, int count, int width, uint8_t* codes) {
  with_width(width, [&](auto width) { read_codes_of<width.value>(from, block, count, codes); });
}

}  // namespace
}  // namespace cg::CG_ISA
