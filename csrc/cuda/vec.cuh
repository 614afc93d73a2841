// How threads share out a tensor: packs of consecutive elements, and the packed bits that belong to each.
//
// A pack is 16 bytes of elements (8 elements of float64, which moves them one by one), so that a thread owns the bits of
// its own elements and writes them as whole bytes. Packs are counted from the start of the tensor, as packed bytes are;
// where a pointer is not aligned for that, the same packs are moved element by element.
#pragma once

#include <type_traits>

#include "kernels.h"

#define CG_D __device__ __forceinline__

namespace cg::cuda {

constexpr int kThreads = 128, kWarp = 32;
// Packs that a thread has in flight at once.
constexpr int kUnroll = 2;

template <class T>
constexpr bool kVector = sizeof(T) < 8;
template <class T>
constexpr int kPack = kVector<T> ? 16 / sizeof(T) : 8;

struct alignas(16) Words {
  uint32_t w[4];
};

template <class T>
CG_D Words load_words(const void* from, int64_t pack) {
  return static_cast<const Words*>(from)[pack];
}
template <class T>
CG_D void store_words(void* to, int64_t pack, const Words& words) {
  static_cast<Words*>(to)[pack] = words;
}

CG_D float widen(float v) { return v; }
CG_D double widen(double v) { return v; }
CG_D float widen(bf16 v) { return to_float(v); }
CG_D float widen(f16 v) { return to_float(v); }
template <class T>
CG_D T narrow(compute_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) return to_bf16(v);
  else if constexpr (std::is_same_v<T, f16>) return to_f16(v);
  else return v;
}

// Two numbers rounded to a 16-bit T, the first in the low half: one instruction.
template <class T>
CG_D uint32_t round_two(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#endif
}
template <class T>
CG_D float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
CG_D float high_half(uint32_t word) {
  if constexpr (std::is_same_v<T, bf16>) return bit_cast<float>(word & 0xffff0000u);
  else return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// The elements of a pack as float32, and back, rounding.
template <class T>
CG_D void unpack(const Words& words, float (&v)[kPack<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = bit_cast<float>(words.w[i]);
    } else {
      v[2 * i] = low_half<T>(words.w[i]);
      v[2 * i + 1] = high_half<T>(words.w[i]);
    }
  }
}
template <class T>
CG_D Words round_all(const float (&v)[kPack<T>]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) words.w[i] = bit_cast<uint32_t>(v[i]);
    else words.w[i] = round_two<T>(v[2 * i], v[2 * i + 1]);
  }
  return words;
}

// Bits of kBytes bytes as one number, and the type that moves them at once.
template <int kBytes>
using bytes_t = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// The kWidth bits that belong to each of a pack's first `count` elements. `whole`: the pack is whole and the pointer
// aligned for its bytes. A pack of 4 elements has half a byte of 1-bit flags.
template <int kCount, int kWidth>
CG_D uint64_t read_bits(const uint8_t* from, int64_t pack, int count, bool whole) {
  constexpr int kBits = kCount * kWidth;
  if constexpr (kBits < 8) {
    static_assert(kBits == 4);
    return count == 0 ? 0 : from[pack / 2] >> (pack % 2 * 4) & 15;
  } else {
    if (whole) return static_cast<bytes_t<kBits / 8>>(reinterpret_cast<const bytes_t<kBits / 8>*>(from)[pack]);
    uint64_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < (count * kWidth + 7) / 8; ++i) {
      bits |= static_cast<uint64_t>(from[pack * (kBits / 8) + i]) << (8 * i);
    }
    return bits;
  }
}

// The lanes of a warp hold consecutive packs and call it together: two of them may share a byte.
template <int kCount, int kWidth>
CG_D void write_bits(uint8_t* to, int64_t pack, int count, bool whole, uint64_t bits) {
  constexpr int kBits = kCount * kWidth;
  if constexpr (kBits < 8) {
    static_assert(kBits == 4);
    const uint32_t own = static_cast<uint32_t>(bits), next = __shfl_down_sync(0xffffffffu, own, 1);
    if (pack % 2 == 0 && count > 0) to[pack / 2] = static_cast<uint8_t>(own | next << 4);
  } else {
    if (whole) {
      reinterpret_cast<bytes_t<kBits / 8>*>(to)[pack] = static_cast<bytes_t<kBits / 8>>(bits);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < (count * kWidth + 7) / 8; ++i) {
      to[pack * (kBits / 8) + i] = static_cast<uint8_t>(bits >> (8 * i));
    }
  }
}

// whole(first) for groups of kUnroll whole packs, first + u * kThreads; then rest(pack, count) for the packs that are
// left, with a count of 0 past the end. All threads of a block make the same calls, so that its warps stay together.
template <class T, class Whole, class Rest>
CG_D void for_each_pack(int64_t count, bool vector, const Whole& whole, const Rest& rest) {
  constexpr int64_t kTile = kUnroll * kThreads;
  int64_t done = 0;
  if constexpr (kVector<T>) {
    if (vector) {
      done = count / kPack<T> / kTile * kTile;
      for (int64_t tile = blockIdx.x * kTile; tile < done; tile += gridDim.x * kTile) whole(tile + threadIdx.x);
    }
  }
  const int64_t packs = (count + kPack<T> - 1) / kPack<T>;
  for (int64_t base = done + int64_t{blockIdx.x} * kThreads; base < packs; base += int64_t{gridDim.x} * kThreads) {
    const int64_t pack = base + threadIdx.x, left = count - pack * kPack<T>;
    rest(pack, left <= 0 ? 0 : left < kPack<T> ? static_cast<int>(left) : kPack<T>);
  }
}

}  // namespace cg::cuda
