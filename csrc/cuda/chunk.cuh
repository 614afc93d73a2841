// How threads share a tensor: in chunks of consecutive elements, each with its packed bits.
//
// A chunk is 16 bytes of elements (8 elements of float64, which moves them one by one), so that a thread owns the bits
// of its own elements and writes them as whole bytes. Chunks are counted from the start of the tensor, as packed bytes
// are. If a pointer is not aligned for that, the same chunks are moved element by element.
#pragma once

#include <type_traits>

#include "../arguments.h"

#define CG_D __device__ __forceinline__

namespace cg::cuda {

constexpr int kThreads = 128, kWarp = 32;
// Chunks that a thread has in flight.
constexpr int kUnroll = 2;

template <class T>
constexpr bool kVector = sizeof(T) < 8;
template <class T>
constexpr int kChunk = kVector<T> ? 16 / sizeof(T) : 8;

struct alignas(16) Chunk {
  uint32_t w[4];
};

template <class T>
CG_D Chunk load_chunk(const void* from, int64_t chunk) {
  return static_cast<const Chunk*>(from)[chunk];
}
template <class T>
CG_D void store_chunk(void* to, int64_t chunk, const Chunk& words) {
  static_cast<Chunk*>(to)[chunk] = words;
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

// A chunk's elements as float32, and back with rounding.
template <class T>
CG_D void widen_chunk(const Chunk& words, float (&v)[kChunk<T>]) {
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
CG_D Chunk round_chunk(const float (&v)[kChunk<T>]) {
  Chunk words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) words.w[i] = bit_cast<uint32_t>(v[i]);
    else words.w[i] = round_two<T>(v[2 * i], v[2 * i + 1]);
  }
  return words;
}

// The integer type of kBytes bytes, which moves them at once.
template <int kBytes>
using bytes_t =
    std::conditional_t<kBytes == 1, uint8_t,
                       std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;

// The kWidth bits of each of a chunk's first `count` elements. `whole`: the chunk is whole and the pointer
// aligned for its bytes. A chunk of 4 elements has half a byte of 1-bit flags.
template <int kCount, int kWidth>
CG_D uint64_t read_bits(const uint8_t* from, int64_t chunk, int count, bool whole) {
  constexpr int kBits = kCount * kWidth;
  if constexpr (kBits < 8) {
    static_assert(kBits == 4);
    return count == 0 ? 0 : from[chunk / 2] >> (chunk % 2 * 4) & 15;
  } else {
    if (whole) return static_cast<bytes_t<kBits / 8>>(reinterpret_cast<const bytes_t<kBits / 8>*>(from)[chunk]);
    uint64_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < (count * kWidth + 7) / 8; ++i) {
      bits |= static_cast<uint64_t>(from[chunk * (kBits / 8) + i]) << (8 * i);
    }
    return bits;
  }
}

// All lanes of a warp call this together with consecutive chunks: two of them may share a byte.
template <int kCount, int kWidth>
CG_D void write_bits(uint8_t* to, int64_t chunk, int count, bool whole, uint64_t bits) {
  constexpr int kBits = kCount * kWidth;
  if constexpr (kBits < 8) {
    static_assert(kBits == 4);
    const uint32_t own = static_cast<uint32_t>(bits), next = __shfl_down_sync(0xffffffffu, own, 1);
    if (chunk % 2 == 0 && count > 0) to[chunk / 2] = static_cast<uint8_t>(own | next << 4);
  } else {
    if (whole) {
      reinterpret_cast<bytes_t<kBits / 8>*>(to)[chunk] = static_cast<bytes_t<kBits / 8>>(bits);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < (count * kWidth + 7) / 8; ++i) {
      to[chunk * (kBits / 8) + i] = static_cast<uint8_t>(bits >> (8 * i));
    }
  }
}

// Calls whole(first) for groups of kUnroll whole chunks, first + u * kThreads, and then rest(chunk, count) for the
// remaining chunks, with a count of 0 past the end. All threads of a block make the same calls, so that warps do not
// diverge.
template <class T, class Whole, class Rest>
CG_D void for_each_chunk(int64_t count, bool vector, const Whole& whole, const Rest& rest) {
  constexpr int64_t kTile = kUnroll * kThreads;
  int64_t done = 0;
  if constexpr (kVector<T>) {
    if (vector) {
      done = count / kChunk<T> / kTile * kTile;
      for (int64_t tile = blockIdx.x * kTile; tile < done; tile += gridDim.x * kTile) whole(tile + threadIdx.x);
    }
  }
  const int64_t chunks = (count + kChunk<T> - 1) / kChunk<T>;
  for (int64_t base = done + int64_t{blockIdx.x} * kThreads; base < chunks; base += int64_t{gridDim.x} * kThreads) {
    const int64_t chunk = base + threadIdx.x, left = count - chunk * kChunk<T>;
    rest(chunk, left <= 0 ? 0 : left < kChunk<T> ? static_cast<int>(left) : kChunk<T>);
  }
}

// Whole aligned chunks [begin, end), kUnroll at a time: calls body(first, words) with those at first + u * apart, where
// one from `end` on is zeros. A block has `apart` threads, which all make the same calls; the next is `step` on.
template <class T, class Body>
CG_D void for_each_whole_chunk(const void* from, int64_t begin, int64_t end, int apart, int64_t step,
                               const Body& body) {
  for (int64_t tile = begin; tile < end; tile += step) {
    const int64_t first = tile + threadIdx.x;
    Chunk words[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * apart < end) words[u] = load_chunk<T>(from, first + u * apart);
    }
    body(first, words);
  }
}
// The same for a tensor, by a grid of blocks of kThreads.
template <class T, class Body>
CG_D void for_each_whole_chunk(const void* from, int64_t chunks, const Body& body) {
  constexpr int64_t kTile = kUnroll * kThreads;
  for_each_whole_chunk<T>(from, blockIdx.x * kTile, chunks, kThreads, gridDim.x * kTile, body);
}

}  // namespace cg::cuda
