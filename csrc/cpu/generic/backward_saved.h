// dy to dx and to the sums of dalpha, from saved bits or codes.
#pragma once

#include <algorithm>
#include <cmath>

#include "blocks.h"
#include "sums.h"

namespace cg::CG_ISA {
namespace {

// What is saved of x for one block, as flags; codes of more than two bits stay bytes. `inside` and `above` are the two
// bits of a state or of a code: A is the sum of the values of those that are set.
struct Flags {
  uint64_t gate = ~uint64_t{0}, inside = 0, above = 0;
};

CG_HD void read_flags(const uint8_t* from, int width, int64_t block, int count, Flags& flags) {
  if (width == 1) return read_packed<1>(from, block, count, &flags.inside);
  uint64_t words[2];
  read_packed<2>(from, block, count, words);
  flags.inside = unspread_bits(words[0]) | unspread_bits(words[1]) << 32;
  flags.above = unspread_bits(words[0] >> 1) | unspread_bits(words[1] >> 1) << 32;
}

CG_HD Flags read_saved(const Backward& a, int64_t block, int count, uint8_t* codes) {
  Flags flags;
  if (a.kind == MaskKind::state) {
    read_flags(a.mask, 2, block, count, flags);
    if (a.ste == Ste::clipped_relu) flags.gate = flags.inside;
    if (a.ste == Ste::relu) flags.gate = flags.inside | flags.above;
  } else if (a.kind != MaskKind::nothing) {
    read_packed<1>(a.mask, block, count, &flags.gate);
  }
  if (a.codes) {
    uint64_t nonzero;
    if (codes_are_flags(a)) {
      read_flags(a.codes, packed_width(a.bits), block, count, flags);
      nonzero = flags.inside | flags.above;
    } else {
      read_codes(a.codes, block, count, packed_width(a.bits), codes);
      nonzero = nonzero_codes(codes);
    }
    // Rounding is ceil or hwgq: x > 0 is c > 0.
    if (a.kind == MaskKind::nothing && a.ste == Ste::relu) flags.gate = nonzero;
  }
  return flags;
}

// dx from a gate. Elements of dy pass bit for bit, whatever their type.
template <class U>
CG_HD void backward_gate(const Backward& a, int64_t block, int count, uint64_t gate) {
  U dy_copy[kBlock], dx_copy[kBlock];
  const U* dy = read_block(static_cast<const U*>(a.grad_y), block, count, dy_copy);
  U* grad_x = static_cast<U*>(a.grad_x) + block * kBlock;
  masked_copy<kBlock>(dy, count == kBlock ? grad_x : dx_copy, BlockBits(gate), 0, a.stream && count == kBlock);
  if (count < kBlock) memcpy(grad_x, dx_copy, count * sizeof(U));
}

// dx alone, from one bit per element, for the whole blocks in [begin, end). Returns the block after them.
template <class U>
CG_HD int64_t backward_mask(const Backward& args, int64_t begin, int64_t end) {
  const Backward a = args;
  const int64_t whole = end < a.count / kBlock ? end : a.count / kBlock;
  const U* dy = static_cast<const U*>(a.grad_y);
  U* dx = static_cast<U*>(a.grad_x);
  for (int64_t block = begin; block < whole; ++block) {
    uint64_t gate;
    memcpy(&gate, a.mask + block * 8, 8);
    prefetch(dy + block * kBlock);
    masked_copy<kBlock>(dy + block * kBlock, dx + block * kBlock, BlockBits(gate), 0, a.stream);
  }
  return begin < whole ? whole : begin;
}

// Sums a block's dy inside and above; calls visit(first) for every two vectors.
template <class T, class Bits, class V, class Visit>
CG_HD void sum_flagged(const T* grad_y, Bits in, Bits over, V& inside, V& above, const Visit& visit) {
#pragma GCC unroll 16
  for (int i = 0; i < kBlock; i += 2 * Lanes<V>::kCount) {
    const Pair<V> v = load_pair_where(grad_y, in, i), w = load_pair_where(grad_y, over, i);
    visit(i);
    inside = inside + (v.first + v.second);
    above = above + (w.first + w.second);
  }
}

// A run of one channel within a block is summed by itself if it is at least this long.
constexpr int kShortRun = 16;

// dalpha, and dx if wanted, from two bits per element (states or codes) for the whole blocks in [begin, end), each read
// once. Returns the block after them. gate(states, block) gives the bits for dx. Many channels need kAddsWeighed.
template <class T, class U, class Gate, class Weights, class Source>
CG_HD int64_t backward_states(const Backward& a, int64_t begin, int64_t end, const Source& source,
                              ChannelSums<compute_t<T>>& sums, const Weights weights, const Gate& gate) {
  using V = Vec<compute_t<T>>;
  constexpr int kCount = 2 * Lanes<V>::kCount;
  const int64_t whole = end < a.count / kBlock ? end : a.count / kBlock;
  const uint8_t* const two_bits = a.codes ? a.codes : a.mask;
  const T* const dy_of_all = static_cast<const T*>(a.grad_y);
  U* const dx_of_all = static_cast<U*>(a.grad_x);
  const bool stream = a.stream;
  const auto sum_selected = [&](int64_t first, int64_t last, bool with_dx) {
    for (int64_t block = first; block < last; ++block) {
      const T* grad_y = dy_of_all + block * kBlock;
      U* grad_x = dx_of_all + block * kBlock;
      const BlockStates states(two_bits + block * 16);
      V inside(compute_t<T>(0)), above(compute_t<T>(0));
      prefetch(grad_y);
      sum_flagged(grad_y, states.inside(), states.above(), inside, above, [&](int i) {
        if (with_dx) masked_copy<kCount>(reinterpret_cast<const U*>(grad_y), grad_x, gate(states, block), i, stream);
      });
      sums.start(block, source);
      sums.add_flagged(source, 0, inside, above);
    }
  };
  if constexpr (!std::is_same_v<Source, OneAlpha<compute_t<T>>>) {
    for (int64_t block = begin; block < whole; ++block) {
      const T* grad_y = dy_of_all + block * kBlock;
      U* grad_x = dx_of_all + block * kBlock;
      const uint8_t* packed = two_bits + block * 16;
      prefetch(grad_y);
      if (dx_of_all) {
        masked_copy<kBlock>(reinterpret_cast<const U*>(grad_y), grad_x, gate(BlockStates(packed), block), 0, stream);
      }
      sums.start(block, source);
      for (int i = 0; i < kBlock; i += kCount) {
        const int j = i + Lanes<V>::kCount;
        const Pair<V> weight = weights_of<false>(packed, weights, i);
        sums.add(source, i, masked_product(Io<T>::load(grad_y + i), weight.first));
        sums.add(source, j, masked_product(Io<T>::load(grad_y + j), weight.second));
      }
      sums.finish(block, source);
    }
  } else if constexpr (kAddsWeighed<V>) {
    for (int64_t first = begin, last; first < whole; first = last) {
      const int64_t chunk_end = sums.chunk_end(first);
      last = chunk_end < whole ? chunk_end : whole;
      const V zero(compute_t<T>(0));
      Pair<Pair<V>> parts{Pair<V>{zero, zero}, Pair<V>{zero, zero}};
      for (int64_t block = first; block < last; ++block) {
        const T* grad_y = dy_of_all + block * kBlock;
        U* grad_x = dx_of_all + block * kBlock;
        const uint8_t* packed = two_bits + block * 16;
        const BlockStates states(packed);
        prefetch(grad_y);
#pragma GCC unroll 16
        for (int i = 0; i < kBlock; i += kCount) {
          add_weighed(grad_y, packed, weights, i, i % (2 * kCount) ? parts.first : parts.second);
        }
        if (dx_of_all) {
          masked_copy<kBlock>(reinterpret_cast<const U*>(grad_y), grad_x, gate(states, block), 0, stream, true);
        }
      }
      const Pair<V> both = parts.first + parts.second;
      const compute_t<T> sum = Lanes<V>::sum(both.first + both.second);
      if (std::isfinite(sum)) {
        sums.of_chunk()[source.channel] += sum;
      } else {
        sum_selected(first, last, false);  // an infinite dy may have met a weight of 0: redo it with selects
      }
    }
  } else {
    sum_selected(begin, whole, dx_of_all);
  }
  return begin < whole ? whole : begin;
}

// The same where channels are innermost, in whole blocks: a column of blocks at a time is summed in registers, down as
// many rows as leave room in the nearest cache for the next ones.
template <class T, class U, class Gate, class Weights>
CG_HD int64_t backward_columns(const Backward& a, int64_t begin, int64_t end, ChannelSums<compute_t<T>>& sums,
                               const Weights& weights, const Gate& gate) {
  using V = Vec<compute_t<T>>;
  constexpr int kCount = 2 * Lanes<V>::kCount;
  constexpr int64_t kBytes = kBlock * sizeof(T), kNear = 1 << 14, kLeast = 2, kMost = 8;
  const int64_t whole = end < a.count / kBlock ? end : a.count / kBlock, row = a.alphas.channels / kBlock;
  const int64_t rows = std::clamp(kNear / (row * kBytes), kLeast, kMost);
  const uint8_t* const two_bits = a.codes ? a.codes : a.mask;
  const T* const dy_of_all = static_cast<const T*>(a.grad_y);
  U* const dx_of_all = static_cast<U*>(a.grad_x);
  const bool stream = a.stream;
  for (int64_t first = begin, last; first < whole; first = last) {
    last = first + rows * row;
    const int64_t chunk_end = sums.chunk_end(first);
    if (last > chunk_end) last = chunk_end;
    if (last > whole) last = whole;
    const int64_t column = first % row;
    for (int64_t next = 0; next < row && first + next < last; ++next) {
      const V zero(compute_t<T>(0));
      Pair<V> of_column[kBlock / kCount];
      for (auto& each : of_column) each = Pair<V>(zero, zero);
      for (int64_t block = first + next; block < last; block += row) {
        const T* grad_y = dy_of_all + block * kBlock;
        const uint8_t* packed = two_bits + block * 16;
        prefetch(grad_y, rows * row * kBytes);
#pragma GCC unroll 16
        for (int i = 0; i < kBlock; i += kCount) add_each_weighed(grad_y, packed, weights, i, of_column[i / kCount]);
        if (dx_of_all) {
          masked_copy<kBlock>(reinterpret_cast<const U*>(grad_y), dx_of_all + block * kBlock,
                              gate(BlockStates(packed), block), 0, stream, true);
        }
      }
      compute_t<T>* to = sums.of_chunk() + (column + next < row ? column + next : column + next - row) * kBlock;
      for (int i = 0; i < kBlock; i += kCount) add_pair_of<T>(to + i, of_column[i / kCount]);
    }
  }
  return begin < whole ? whole : begin;
}

// dx, and dalpha by the rules that need no x, from saved bits or codes.
template <class T>
void backward_saved(const Backward& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  using V = Vec<A>;
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  constexpr int kCount = Lanes<V>::kCount;
  const Backward a = args;
  const bool one_bit = a.kind != MaskKind::nothing && a.kind != MaskKind::state;
  if (one_bit && a.grad_x && !a.partial && !a.codes) begin = backward_mask<U>(a, begin, end);
  ChannelSums<A> sums(a);
  const auto weights = [&] {
    if constexpr (kAddsWeighed<V>) return sums.weights();
    else return nullptr;
  }();
  const bool sums_two_bits = a.partial && (a.codes ? packed_width(a.bits) == 2 : a.kind == MaskKind::state);
  const auto with_gate = [&](const auto& body) {
    if (one_bit) {
      body([&](const BlockStates&, int64_t block) {
        uint64_t bits;
        memcpy(&bits, a.mask + block * 8, 8);
        return BlockBits(bits);
      });
    } else if (a.ste == Ste::clipped_relu) {
      body([](const BlockStates& states, int64_t) { return states.inside(); });
    } else if (a.ste == Ste::relu) {
      body([](const BlockStates& states, int64_t) { return states.either(); });
    } else {
      body([](const BlockStates&, int64_t) { return BlockBits(~uint64_t{0}); });
    }
  };
  if constexpr (kAddsWeighed<V>) {
    if (sums_two_bits && a.alphas.inner == 1 && a.alphas.channels > 1 && a.alphas.channels % kBlock == 0) {
      with_gate([&](const auto& gate) { begin = backward_columns<T, U>(a, begin, end, sums, weights, gate); });
    }
  }
  for_each_range<A, false>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
    constexpr bool kOneAlpha = std::is_same_v<std::decay_t<decltype(source)>, OneAlpha<A>>;
    if constexpr (kOneAlpha || kAddsWeighed<V>) {
      if (sums_two_bits && (kOneAlpha || a.alphas.inner < kShortRun)) {
        with_gate(
            [&](const auto& gate) { first = backward_states<T, U>(a, first, last, source, sums, weights, gate); });
      }
    }
    for (int64_t block = first; block < last; ++block) {
      const int count = block_count(a.count, block);
      uint8_t codes[kBlock];
      prefetch(static_cast<const T*>(a.grad_y) + block * kBlock);
      const Flags saved = read_saved(a, block, count, codes);
      if (a.grad_x) backward_gate<U>(a, block, count, saved.gate);
      if (!a.partial) continue;
      T copy[kBlock];
      const T* grad_y = read_block(static_cast<const T*>(a.grad_y), block, count, copy);
      const bool flagged = !a.codes || codes_are_flags(a);
      if (flagged && (kOneAlpha || a.alphas.inner >= kShortRun)) {
        const auto add_run = [&](const OneAlpha<A>& run, uint64_t bits) {
          V inside(A(0)), above(A(0));
          sum_flagged(grad_y, BlockBits(saved.inside & bits), BlockBits(saved.above & bits), inside, above, [](int) {});
          sums.start(block, run);
          sums.add_flagged(run, 0, inside, above);
        };
        if constexpr (kOneAlpha) {
          add_run(source, ~uint64_t{0});
        } else {
          for_each_run(a.alphas, source.channel, source.left, [&](int64_t channel, int from, int to) {
            add_run(OneAlpha<A>{{}, {}, channel}, ~uint64_t{0} >> (kBlock - (to - from)) << from);
          });
        }
        continue;
      }
      sums.start(block, source);
      if (!flagged) {
        for (int i = 0; i < kBlock; i += kCount) {
          sums.add(source, i, masked_product(Io<T>::load(grad_y + i), Lanes<V>::load_codes(codes + i)));
        }
      } else if constexpr (!kOneAlpha) {
        const BlockBits inside(saved.inside), above(saved.above);
        for (int i = 0; i < kBlock; i += kCount) {
          sums.add_flagged(source, i, load_where(grad_y, inside, i), load_where(grad_y, above, i));
        }
      }
      sums.finish(block, source);
    }
  });
}

}  // namespace
}  // namespace cg::CG_ISA
