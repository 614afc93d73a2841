// Where the loops read each element's alpha.
#pragma once

#include "../../dispatch.h"
#include "instruction_set.h"

namespace cg::CG_ISA {
namespace {

// One alpha for the whole block.
template <class A>
struct OneAlpha {
  Vec<A> alpha, inverse;
  int64_t channel;
  CG_HD Vec<A> alpha_at(int) const { return alpha; }
  CG_HD Vec<A> inverse_at(int) const { return inverse; }
  CG_HD const OneAlpha& of(int64_t) const { return *this; }
};

// Per-element alphas, read from two arrays; `channel` is the first element's, with `left` elements to go.
template <class A>
struct AlphaPerElement {
  const A* alpha;
  const A* inverse;
  int64_t channel, left;
  CG_HD Vec<A> alpha_at(int i) const { return Io<A>::load(alpha + i); }
  CG_HD Vec<A> inverse_at(int i) const { return Io<A>::load(inverse + i); }
  CG_HD const AlphaPerElement& of(int64_t) const { return *this; }
};

// The same for every block, if channels are the innermost dimension.
template <class A>
struct AlphaPerColumn {
  const A* alpha;
  const A* inverse;
  int64_t channels;
  CG_HD AlphaPerElement<A> of(int64_t block) const {
    const int64_t channel = block * kBlock % channels;
    return {alpha + channel, inverse + channel, channel, 1};
  }
};

// Calls body(channel, first, last) for each run of one channel within a block, given the first element's channel.
template <class Body>
CG_HD void for_each_run(const Alphas& alphas, int64_t channel, int64_t left, const Body& body) {
  for (int first = 0; first < kBlock;) {
    const int last = left < kBlock - first ? first + static_cast<int>(left) : kBlock;
    body(channel, first, last);
    first = last;
    left = alphas.inner;
    if (++channel == alphas.channels) channel = 0;
  }
}

// Calls body(first, last, source) for ranges of blocks with a matching source of alpha. Without kValues the source only
// says whether a block has one channel, and which. Blocks of several channels come one at a time.
template <class A, bool kValues = true, class Body>
CG_HD void for_each_range(const Alphas& alphas, int64_t begin, int64_t end, const Body& body) {
  const A* alpha = static_cast<const A*>(alphas.values);
  const A* inverse = static_cast<const A*>(alphas.inverses);
  const auto one_alpha = [&](int64_t channel) {
    OneAlpha<A> source;  // zeros would take longer than a short run
    source.channel = channel;
    if constexpr (kValues) source.alpha = Vec<A>(alpha[channel]), source.inverse = Vec<A>(inverse[channel]);
    return source;
  };
  if (alphas.channels == 1) {
    body(begin, end, one_alpha(0));
    return;
  }
  // The channel that a block begins in and where that channel ends. Counted up, as a division takes as long as a block.
  int64_t channel = begin * kBlock / alphas.inner, channel_end = (channel + 1) * alphas.inner;
  channel %= alphas.channels;
  const int64_t step = kBlock % alphas.channels;
  for (int64_t block = begin; block < end;) {
    if (alphas.inner == 1) {
      body(block, block + 1, AlphaPerElement<A>{alpha + channel, inverse + channel, channel, 1});
      ++block;
      channel += step;
      if (channel >= alphas.channels) channel -= alphas.channels;
      continue;
    }
    for (; channel_end <= block * kBlock; channel_end += alphas.inner) {
      if (++channel == alphas.channels) channel = 0;
    }
    const int64_t whole = channel_end / kBlock;
    if (block < whole) {
      const int64_t last = whole < end ? whole : end;
      body(block, last, one_alpha(channel));
      block = last;
      continue;
    }
    A values[kBlock], inverses[kBlock];
    const int64_t left = channel_end - block * kBlock;
    if constexpr (kValues) {
      for_each_run(alphas, channel, left, [&](int64_t channel, int first, int last) {
        for (int i = first; i < last; ++i) values[i] = alpha[channel], inverses[i] = inverse[channel];
      });
    }
    body(block, block + 1, AlphaPerElement<A>{values, inverses, channel, left});
    ++block;
  }
}

// Calls body(Constant<true>{}), or body(Constant<false>{}) for irregular alphas in the set that serves them.
template <class Body>
CG_HD void with_regular(const Alphas& alphas, const Body& body) {
  if constexpr (kAnyAlpha) {
    if (!alphas.regular) return body(Constant<false>{});
  }
  body(Constant<true>{});
}

}  // namespace
}  // namespace cg::CG_ISA
