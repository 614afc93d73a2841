// The AVX-512, VNNI and AMX instructions that csrc/cpu's integer kernels use, in plain C++, so that these run on any
// x86-64 with AVX2. Each function is what Intel's manual says of the instruction; nothing is known of speed. Included
// before everything else in place of the compiler's own (CMakeLists.txt).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace host {

// A register as numbers of type T.
template <class T, class R>
struct Numbers {
  static constexpr int kCount = sizeof(R) / sizeof(T);
  T v[kCount];
  explicit Numbers(R from) { memcpy(v, &from, sizeof(R)); }
  Numbers() : v{} {}
  operator R() const {
    R to;
    memcpy(&to, v, sizeof(R));
    return to;
  }
};
using R512 = long long __attribute__((vector_size(64)));
using R256 = __m256i;

template <class T, class R, class F>
R each(F f) {
  Numbers<T, R> to;
  for (int i = 0; i < to.kCount; ++i) to.v[i] = f(i);
  return to;
}
template <class R>
R dpbusd(R sums, R codes, R weights) {
  const Numbers<uint8_t, R> c(codes);
  const Numbers<int8_t, R> w(weights);
  const Numbers<int32_t, R> s(sums);
  return each<int32_t, R>([&](int i) {
    uint32_t sum = static_cast<uint32_t>(s.v[i]);
    for (int j = 4 * i; j < 4 * i + 4; ++j) sum += static_cast<uint32_t>(c.v[j] * w.v[j]);
    return static_cast<int32_t>(sum);
  });
}
inline int16_t saturated(int32_t v) { return static_cast<int16_t>(std::clamp(v, -32768, 32767)); }

}  // namespace host

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32(sums, codes, weights) host::dpbusd<host::R256>(sums, codes, weights)

#if defined(CG_HOST_AVX512)
#define __m512i host::R512
#define __mmask16 uint16_t
using host::each, host::Numbers, host::R256, host::R512;

inline R512 host_load(const void* p) {
  R512 v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class R>
void host_store(void* p, R v) {
  static_assert(sizeof(v) == 64);
  memcpy(p, &v, 64);
}
inline R512 host_join(R256 low, R256 high) {
  const Numbers<int64_t, R256> l(low), h(high);
  return each<int64_t, R512>([&](int i) { return i < 4 ? l.v[i] : h.v[i - 4]; });
}
inline R256 host_half(R512 v, int half) {
  const Numbers<int64_t, R512> n(v);
  return each<int64_t, R256>([&](int i) { return n.v[4 * half + i]; });
}
// Lanes of 128 bits: the low or high halves of two registers in turn, in numbers of T.
template <class T>
R512 host_unpack(R512 a, R512 b, bool high) {
  const Numbers<T, R512> x(a), y(b);
  constexpr int kLane = 16 / sizeof(T);
  return each<T, R512>([&](int i) {
    const int from = i / kLane * kLane + (high ? kLane / 2 : 0) + i % kLane / 2;
    return i % 2 ? y.v[from] : x.v[from];
  });
}
inline R512 host_shuffle_lanes(R512 a, R512 b, int control) {
  const Numbers<int32_t, R512> x(a), y(b);
  return each<int32_t, R512>([&](int i) {
    const int lane = i / 4, from = (control >> (2 * lane) & 3) * 4 + i % 4;
    return lane < 2 ? x.v[from] : y.v[from];
  });
}
inline R512 host_maddubs(R512 codes, R512 weights) {
  const Numbers<uint8_t, R512> c(codes);
  const Numbers<int8_t, R512> w(weights);
  return each<int16_t, R512>(
      [&](int i) { return host::saturated(c.v[2 * i] * w.v[2 * i] + c.v[2 * i + 1] * w.v[2 * i + 1]); });
}
inline R512 host_madd(R512 a, R512 b) {
  const Numbers<int16_t, R512> x(a), y(b);
  return each<int32_t, R512>([&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
template <class T>
R512 host_add(R512 a, R512 b) {
  const Numbers<T, R512> x(a), y(b);
  return each<T, R512>(
      [&](int i) { return static_cast<T>(static_cast<uint32_t>(x.v[i]) + static_cast<uint32_t>(y.v[i])); });
}
// The bytes of half a register, in 16 bits each.
template <class T>
R512 host_widen(R256 half) {
  const Numbers<T, R256> n(half);
  return each<int16_t, R512>([&](int i) { return static_cast<int16_t>(n.v[i]); });
}
// Numbers of two registers by their places in both.
inline R512 host_permute(R512 a, R512 places, R512 b) {
  const Numbers<int32_t, R512> x(a), at(places), y(b);
  return each<int32_t, R512>([&](int i) { return at.v[i] & 16 ? y.v[at.v[i] & 15] : x.v[at.v[i] & 15]; });
}
template <class T, class F>
R512 host_map(R512 a, F f) {
  const Numbers<T, R512> x(a);
  return each<T, R512>([&](int i) { return static_cast<T>(f(x.v[i])); });
}
inline R512 host_masked_load(uint16_t mask, const void* p) {
  const int32_t* from = static_cast<const int32_t*>(p);
  return each<int32_t, R512>([&](int i) { return mask >> i & 1 ? from[i] : 0; });
}
inline void host_masked_store(void* p, uint16_t mask, R512 v) {
  const Numbers<int32_t, R512> n(v);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<int32_t*>(p)[i] = n.v[i];
  }
}
inline int32_t host_sum(R512 v) {
  uint32_t sum = 0;
  for (int32_t each : Numbers<int32_t, R512>(v).v) sum += static_cast<uint32_t>(each);
  return static_cast<int32_t>(sum);
}

#define _mm512_loadu_si512(p) host_load(p)
#define _mm512_storeu_si512(p, v) host_store(p, v)
#define _mm512_castsi512_si256(v) host_half(v, 0)
#define _mm512_extracti64x4_epi64(v, half) host_half(v, half)
#define _mm512_castsi256_si512(v) host_join(v, R256{})
#define _mm512_zextsi256_si512(v) host_join(v, R256{})
#define _mm512_inserti64x4(v, high, one) host_join(host_half(v, 0), high)
#define _mm512_set1_epi8(n) host::each<int8_t, host::R512>([&](int) { return static_cast<int8_t>(n); })
#define _mm512_set1_epi16(n) host::each<int16_t, host::R512>([&](int) { return static_cast<int16_t>(n); })
#define _mm512_set1_epi32(n) host::each<int32_t, host::R512>([&](int) { return n; })
#define _mm512_set1_epi64(n) host::each<int64_t, host::R512>([&](int) { return n; })
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) host_load(std::begin({__VA_ARGS__}))
#define _mm512_cvtepu8_epi16 host_widen<uint8_t>
#define _mm512_cvtepi8_epi16 host_widen<int8_t>
#define _mm512_permutex2var_epi32 host_permute
#define _mm512_slli_epi16(v, n) host_map<uint16_t>(v, [&](uint16_t each) { return each << (n); })
#define _mm512_srli_epi16(v, n) host_map<uint16_t>(v, [&](uint16_t each) { return each >> (n); })
#define _mm512_srai_epi32(v, n) host_map<int32_t>(v, [&](int32_t each) { return each >> (n); })
#define _mm512_add_epi16 host_add<int16_t>
#define _mm512_add_epi32 host_add<int32_t>
#define _mm512_maddubs_epi16 host_maddubs
#define _mm512_madd_epi16 host_madd
#define _mm512_dpbusd_epi32 host::dpbusd<R512>
#define _mm512_reduce_add_epi32 host_sum
#define _mm512_unpacklo_epi32(a, b) host_unpack<int32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) host_unpack<int32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) host_unpack<int64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) host_unpack<int64_t>(a, b, true)
#define _mm512_shuffle_i32x4 host_shuffle_lanes
#define _mm512_maskz_loadu_epi32 host_masked_load
#define _mm512_mask_storeu_epi32 host_masked_store

// Tiles of the configuration, which must be set before use; loading one clears them.
namespace host {

struct Tiles {
  uint8_t config[64] = {};
  uint8_t data[8][16][64] = {};

  void require(int tile) const {
    if (config[0] == 1 && config[48 + tile] == 16 && config[16 + 2 * tile] == 64 && config[17 + 2 * tile] == 0) return;
    std::printf("tile %d is not configured as 16 rows of 64 bytes\n", tile);
    std::abort();
  }
};
inline Tiles tiles;

inline void load_config(const void* config) {
  tiles = {};
  memcpy(tiles.config, config, 64);
}
inline void load_tile(int to, const void* from, int64_t stride) {
  tiles.require(to);
  for (int r = 0; r < 16; ++r) memcpy(tiles.data[to][r], static_cast<const uint8_t*>(from) + r * stride, 64);
}
inline void store_tile(int from, void* to, int64_t stride) {
  tiles.require(from);
  for (int r = 0; r < 16; ++r) memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[from][r], 64);
}
// sums[m][n] += signed a[m][4 k ...] * unsigned b[k][4 n ...]
inline void multiply_tiles(int sums, int a, int b) {
  for (int tile : {sums, a, b}) tiles.require(tile);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      memcpy(&sum, tiles.data[sums][m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k)
        sum += static_cast<int8_t>(tiles.data[a][m][k]) * tiles.data[b][k / 4][4 * n + k % 4];
      memcpy(tiles.data[sums][m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace host

#undef _tile_loadconfig
#define _tile_loadconfig(p) host::load_config(p)
#define _tile_storeconfig(p) memcpy(p, host::tiles.config, 64)
#define _tile_release() (host::tiles = {})
#undef _tile_zero
#define _tile_zero(tile) memset(host::tiles.data[tile], 0, sizeof(host::tiles.data[tile]))
#undef _tile_loadd
#define _tile_loadd host::load_tile
#undef _tile_stored
#define _tile_stored host::store_tile
#undef _tile_dpbsud
#define _tile_dpbsud host::multiply_tiles
#endif
