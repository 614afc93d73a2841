// One number at a time: the vectors of the baseline build, with the interface that kernels.inl asks of every
// instruction set:
//   Vec<A>             numbers of compute type A: the operations of math/macros.h
//   Lanes<V>            kCount; masks to and from bits; codes to and from bytes; the sum over lanes
//   Io<T>               load; store and stream (past the caches, aligned) a vector whose numbers are numbers of T
//   round_for_store<T>  what is left to do for Io<T>::store of any number to store it rounded to T
//   Pair<V>              two vectors (two.h); load_pair and store_pair of blocks.inl may be overloaded for a T
//   kChains             how many Twos a formula that is one chain of operations is evaluated for side by side: 1 or 2
//   LargeTable<V>       at(codes): the entries of a table of up to 256 numbers for a vector's codes, from memory
//   SmallTable<V>       the same for up to kSize numbers, from registers; none where kSize is 0
//   CompareKey<T>          numbers of T as compare_key_t<T> (dtype.h), for staircases of up to kSearchBits, 0 where there is
//                       none: by comparisons up to kCompareBits, from there by look_up(): table entries by indices,
//                       which begin at kIndexStart and count in kIndexUnit; beyond, where kArithmetic, by arithmetic, with
//                       mask() and whole(). floats() makes a vector or two of it, in an order of its own, in which
//                       load_floats() loads; level(), rounded() and floor() are three ways back. What some vectors saved is
//                       packed by store_bits() of masks, store_states() of two masks, store_codes<w>() of indices.
//                       kHoldsBlock: a block fits into registers beside what is done to it; any_nan() is then of its vectors,
//                       and load_without_prefetch() loads what is read once
//   masked_copy<n>(...)   n elements of raw bits of a block from `first` on, saved where the block's mask says, else zero
//   BlockBits           64 bits, as masked_copy and load_pair_where take them
//   BlockStates         64 2-bit states, from what is packed: inside(), above() and either() are such bits
//   bitpack<w>(...)  64 codes, a byte each, to w bits each (math/bits.h); and bitunpack<w>(...) back
//   nonzero_codes(...)  the bits of c > 0 of 64 codes
//   times_slopes_block  of slopes.inl may be overloaded for a T or a table
//   kAddsWeighed<V>          whether there are weights_of() 2 bits, entries of a SmallTable, and add_weighed(), dy times them
#pragma once

#include "../../math/alpha_grad.h"
#include "../../math/bits.h"
#include "../generic/word_masks.h"
#include "../generic/pair.h"

namespace cg::CG_ISA {

template <class A>
using Vec = A;

template <class A>
struct Lanes {
  static constexpr int kCount = 1;
  static CG_HD uint64_t bits(bool m) { return m; }
  static CG_HD bool mask(uint64_t bits) { return bits & 1; }
  static CG_HD A load(const A* p) { return *p; }
  static CG_HD void store(A* p, A v) { *p = v; }
  static CG_HD void store_codes(uint8_t* p, A code) { *p = static_cast<uint8_t>(code); }
  static CG_HD A load_codes(const uint8_t* p) { return A(*p); }
  static CG_HD A sum(A v) { return v; }
};

template <class T>
CG_HD compute_t<T> round_for_store(compute_t<T> v) {
  return v;
}
CG_HD float widen(float v) { return v; }
CG_HD double widen(double v) { return v; }
CG_HD float widen(bf16 v) { return to_float(v); }
CG_HD float widen(f16 v) { return to_float(v); }
CG_HD void narrow(float* p, float v) { *p = v; }
CG_HD void narrow(double* p, double v) { *p = v; }
CG_HD void narrow(bf16* p, float v) { *p = to_bf16(v); }
CG_HD void narrow(f16* p, float v) { *p = to_f16(v); }

template <class T>
struct Io {
  static CG_HD compute_t<T> load(const T* p) { return widen(*p); }
  static CG_HD void store(T* p, compute_t<T> v) { narrow(p, v); }
  static CG_HD void stream(T* p, compute_t<T> v) { narrow(p, v); }
};

template <int kCount, class U>
CG_HD void masked_copy(const U* from, U* to, uint64_t bits, int first, bool) {
  for (int i = first; i < first + kCount; ++i) to[i] = (bits >> i) & 1 ? from[i] : U(0);
}

template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    memcpy(&eight, codes + 8 * i, 8);
    eight = ByteFields<kWidth>::gather(eight);
    memcpy(packed + kWidth * i, &eight, kWidth);
  }
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 8; ++i) {
    uint64_t eight = 0;
    memcpy(&eight, packed + kWidth * i, kWidth);
    eight = ByteFields<kWidth>::scatter(eight);
    memcpy(codes + 8 * i, &eight, 8);
  }
}
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(codes[i] != 0) << i;
  return bits;
}

template <class A>
struct LargeTable {
  const A* entries;
  CG_HD LargeTable(const A* from, int) : entries(from) {}
  CG_HD A at(const uint8_t* codes) const { return entries[*codes]; }
};
template <class A>
struct SmallTable {
  static constexpr int kSize = 0;
};

template <class T>
struct CompareKey {
  static constexpr int kSearchBits = 0, kCompareBits = 0;
  static constexpr bool kArithmetic = false;
};

constexpr int kPrefetchBytes = 0, kChains = 1;
template <class V>
constexpr bool kAddsWeighed = false;

CG_HD void stream_fence() {}

}  // namespace cg::CG_ISA
