// A block's saved bits (1-bit masks and 2-bit states) as lane masks: each lane tests its own bit. Codes of a byte each
// to kWidth bits each (math/bits.h) and back, a register at a time.
#pragma once

#include "vec.h"

namespace cg::neon {

// A lane of kBytes each of which the i-th has `bits`, times 2^(i * step).
template <int kBytes>
CG_HD uint8x16_t test_places(uint64_t bits, int step, uint64_t first) {
  if constexpr (kBytes == 2) {
    uint16x8_t place;
    for (int i = 0; i < 8; ++i) place[i] = static_cast<uint16_t>(first << (i * step));
    return vreinterpretq_u8_u16(vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), place));
  } else if constexpr (kBytes == 4) {
    uint32x4_t place;
    for (int i = 0; i < 4; ++i) place[i] = static_cast<uint32_t>(first << (i * step));
    return vreinterpretq_u8_u32(vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), place));
  } else {
    return vreinterpretq_u8_u64(vtstq_u64(vdupq_n_u64(bits), uint64x2_t{first, first << step}));
  }
}

struct BlockBits {
  uint64_t all;
  explicit CG_HD BlockBits(uint64_t bits) : all(bits) {}

  // The mask of a vector of elements of kBytes each that begins at element `first`.
  template <int kBytes>
  CG_HD uint8x16_t mask(int first) const {
    return test_places<kBytes>(all >> first, 1, 1);
  }
};

// The same for one bit of each 2-bit state, or for both: `which` is 1, 2 or 3.
struct StateBits {
  const uint8_t* packed;
  uint64_t which;

  template <int kBytes>
  CG_HD uint8x16_t mask(int first) const {
    if constexpr (kBytes == 2) {
      uint16_t eight;
      memcpy(&eight, packed + first / 4, sizeof(eight));
      return test_places<2>(eight, 2, which);
    } else {
      return test_places<kBytes>(static_cast<uint64_t>(packed[first / 4]) >> (first % 4 * 2), 2, which);
    }
  }
};
struct BlockStates {
  const uint8_t* packed;
  explicit CG_HD BlockStates(const uint8_t* from) : packed(from) {}
  CG_HD StateBits inside() const { return {packed, 1}; }
  CG_HD StateBits above() const { return {packed, 2}; }
  CG_HD StateBits either() const { return {packed, 3}; }
};

template <int kCount, class U, class Bits>
CG_HD void masked_copy(const U* from, U* to, Bits bits, int first, bool) {
#pragma GCC unroll 16
  for (int i = first; i < first + kCount; i += 16 / static_cast<int>(sizeof(U))) {
    store(to + i, vandq_u8(load<uint8x16_t>(from + i), bits.template mask<sizeof(U)>(i)));
  }
}

template <class A>
CG_HD Vec<A> masked(Vec<A> v, uint8x16_t mask) {
  return Vec<A>::of_bits(v.bits() & bit_cast<typename Vec<A>::Bits>(mask));
}
template <class T, class Bits>
CG_HD auto load_where(const T* block, Bits bits, int first) {
  return masked(Io<T>::load(block + first), bits.template mask<sizeof(compute_t<T>)>(first));
}
template <class T, class Bits>
  requires(sizeof(T) == 2)
CG_HD Pair<Floats> load_pair_where(const T* block, Bits bits, int first) {
  return split<T>(load<uint16x8_t>(block + first) & vreinterpretq_u16_u8(bits.template mask<2>(first)));
}

// A sum with what is shifted down joins neighbouring fields, two at a time.
template <int kWidth>
CG_HD void bitpack_register(uint8x16_t codes, uint8_t* packed) {
  if constexpr (kWidth == 1) {
    const uint8x16_t set = vtstq_u8(codes, codes);
    store_bits_of(packed, {set});
  } else if constexpr (kWidth == 2) {
    const uint16x8_t words = vreinterpretq_u16_u8(codes);
    const uint32x4_t pairs = vreinterpretq_u32_u16(vsraq_n_u16(words, words, 6));
    const uint16x4_t fours = vmovn_u32(vsraq_n_u32(pairs, pairs, 12));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(fours, fours));
    memcpy(packed, &bytes, 4);
  } else if constexpr (kWidth == 4) {
    const uint16x8_t words = vreinterpretq_u16_u8(codes);
    store(packed, vmovn_u16(vsraq_n_u16(words, words, 4)));
  } else {
    store(packed, codes);
  }
}
template <int kWidth>
CG_HD uint8x16_t bitunpack_register(const uint8_t* packed) {
  if constexpr (kWidth == 1) {
    const uint8x16_t place = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    return vtstq_u8(vcombine_u8(vdup_n_u8(packed[0]), vdup_n_u8(packed[1])), place) & uint8_t{1};
  } else if constexpr (kWidth == 2) {
    const uint8x16_t of_byte = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const int8x16_t down = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
    const uint8x16_t bytes = vreinterpretq_u8_u32(vdupq_n_u32(load<uint32_t>(packed)));
    return vshlq_u8(vqtbl1q_u8(bytes, of_byte), down) & uint8_t{3};
  } else if constexpr (kWidth == 4) {
    const uint8x8_t bytes = load<uint8x8_t>(packed), low = bytes & uint8_t{15}, high = vshr_n_u8(bytes, 4);
    return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
  } else {
    return load<uint8x16_t>(packed);
  }
}

// 64 codes.
template <int kWidth>
CG_HD void bitpack(const uint8_t* codes, uint8_t* packed) {
  for (int i = 0; i < 64; i += 16) bitpack_register<kWidth>(load<uint8x16_t>(codes + i), packed + i * kWidth / 8);
}
template <int kWidth>
CG_HD void bitunpack(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 64; i += 16) store(codes + i, bitunpack_register<kWidth>(packed + i * kWidth / 8));
}
CG_HD uint64_t nonzero_codes(const uint8_t* codes) {
  const auto set = [&](int i) {
    const uint8x16_t sixteen = load<uint8x16_t>(codes + i);
    return vtstq_u8(sixteen, sixteen);
  };
  return vreinterpretq_u64_u8(bits_of(set(0), set(16), set(32), set(48)))[0];
}

}  // namespace cg::neon
