// Codes to y.
#pragma once

#include "alphas.h"
#include "blocks.h"
#include "level_table.h"

namespace cg::CG_ISA {
namespace {

// body(codes, y, stream) writes the levels of a block.
template <class T, class Body>
CG_HD void dequantize_block(const Dequantize& a, int64_t block, const Body& body) {
  const int count = block_count(a.count, block);
  uint8_t codes[kBlock];
  read_codes(a.codes, block, count, packed_width(a.bits), codes);
  T copy[kBlock];
  T* y = static_cast<T*>(a.y) + block * kBlock;
  if (count == kBlock) return body(codes, y, a.stream);
  body(codes, copy, false);
  memcpy(y, copy, count * sizeof(T));
}

template <class T, class Source>
CG_HD void dequantize_range(const Dequantize& a, int64_t first, int64_t last, const Source& source) {
  using V = Vec<compute_t<T>>;
  for (int64_t block = first; block < last; ++block) {
    dequantize_block<T>(a, block, [&](const uint8_t* codes, T* y, bool stream) {
      for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
        const V v = level<T>(Lanes<V>::load_codes(codes + i), source.alpha_at(i));
        if (stream) Io<T>::stream(y + i, v);
        else Io<T>::store(y + i, v);
      }
    });
  }
}

// One alpha, where the set has a LevelTable.
template <class T, int kWidth>
CG_HD void dequantize_packed(const Dequantize& a, int64_t first, int64_t last, float alpha) {
  T levels[1 << kWidth];
  for (int k = 0; k < 1 << kWidth; ++k) {
    levels[k] = bit_cast<T>(compare_key_floor<T>(level<T>(static_cast<float>(k), alpha)));
  }
  const LevelTable<T, kWidth> table(levels, alpha);
  const uint8_t* const codes_of_all = a.codes;
  T* const y_of_all = static_cast<T*>(a.y);
  const int64_t count = a.count, whole = last < count / kBlock ? last : count / kBlock;
  const bool stream = a.stream;
  for (int64_t block = first; block < whole; ++block) {
    table.store(codes_of_all + block * 8 * kWidth, y_of_all + block * kBlock, stream);
  }
  if (whole < last) {
    const int rest = block_count(count, whole);
    uint64_t packed[kWidth];
    T copy[kBlock];
    read_packed<kWidth>(codes_of_all, whole, rest, packed);
    table.store(reinterpret_cast<const uint8_t*>(packed), copy, false);
    memcpy(y_of_all + whole * kBlock, copy, rest * sizeof(T));
  }
}

// One alpha and a 16-bit type: levels are looked up in a register. (In float32 a product is as fast.)
template <class T>
CG_HD void dequantize_table(const Dequantize& a, int64_t first, int64_t last, float alpha) {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  Element entries[Key::kCount];
  for (int i = 0; i < Key::kCount; ++i) entries[i] = compare_key_floor<T>(level<T>(float(i % Key::kEntries), alpha));
  const Key levels = Key::load(entries);
  for (int64_t block = first; block < last; ++block) {
    dequantize_block<Element>(a, block, [&](const uint8_t* codes, Element* y, bool stream) {
      for (int i = 0; i < kBlock; i += Key::kCount) {
        const Key level = Key::template look_up<1>(&levels, Key::load_indices(codes + i));
        if (stream) Key::stream(y + i, level);
        else Key::store(y + i, level);
      }
    });
  }
}

void dequantize(const Dequantize& args, int64_t begin, int64_t end) {
  const Dequantize a = args;
  with_dtype(a.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    using A = compute_t<T>;
    for_each_range<A>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
      constexpr bool kOneAlpha = std::is_same_v<std::decay_t<decltype(source)>, OneAlpha<A>>;
      if constexpr (kOneAlpha) {
        bool ran = false;
        with_width(packed_width(a.bits), [&](auto width) {
          if constexpr (LevelTable<T, width.value>::kServed) {
            if (last - first < 1 << width.value >> 2) return;  // a table takes longer
            dequantize_packed<T, width.value>(a, first, last, static_cast<const A*>(a.alphas.values)[source.channel]);
            ran = true;
          }
        });
        if (ran) return;
      }
      if constexpr (sizeof(T) == 2 && CompareKey<T>::kSearchBits > 0 && kOneAlpha) {
        const bool fits = 1 << a.bits <= CompareKey<T>::kEntries;
        if (fits) return dequantize_table<T>(a, first, last, static_cast<const A*>(a.alphas.values)[source.channel]);
      }
      dequantize_range<T>(a, first, last, source);
    });
    if (a.stream) stream_fence();
  });
}

}  // namespace
}  // namespace cg::CG_ISA
