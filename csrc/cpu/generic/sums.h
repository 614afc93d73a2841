// The sums of dalpha, per chunk of blocks and channel.
#pragma once

#include "alphas.h"

namespace cg::CG_ISA {
namespace {

// Whether codes are summed bit by bit, as states are.
CG_HD bool codes_are_flags(const Backward& a) { return a.codes && packed_width(a.bits) <= 2; }

// A term is a select, not a product: dy may be infinite where A is 0.
template <class V>
CG_HD V masked_product(V dy, V value) {
  const V zero(scalar_of<V>(0));
  return select(value != zero, mul(dy, value), zero);
}

// Sums dy * A per chunk and channel. Blocks of one channel are summed in registers until the chunk or the channel
// changes.
template <class A>
class ChannelSums {
  using V = Vec<A>;
  static constexpr int kCount = Lanes<V>::kCount;

 public:
  explicit CG_HD ChannelSums(const Backward& a)
      : a_(a),
        inside_factor_(codes_are_flags(a) ? A(1) : inside_value(a.rule, A((1 << a.bits) - 1))),
        above_factor_(codes_are_flags(a) ? A(2) : A((1 << a.bits) - 1)) {}
  CG_HD ~ChannelSums() { flush(); }

  // Call before a block's terms; blocks come in order.
  CG_HD void start(int64_t block, const OneAlpha<A>& source) {
    A* const sum = sums_of_chunk(block) + source.channel;
    if (sum == sum_) return;
    flush();
    sum_ = sum;
  }
  CG_HD void start(int64_t block, const AlphaPerElement<A>& source) {
    const bool in_place = a_.alphas.inner == 1 && source.channel + kBlock <= a_.alphas.channels;
    to_ = in_place ? sums_of_chunk(block) + source.channel : nullptr;
  }

  CG_HD void add(const OneAlpha<A>&, int, V term) { total_ = total_ + term; }
  CG_HD void add(const AlphaPerElement<A>&, int i, V term) {
    if (to_) Io<A>::store(to_ + i, Io<A>::load(to_ + i) + term);
    else Io<A>::store(terms_ + i, term);
  }

  // The same for dy inside and above, not yet multiplied by A, which is factored out of the sums if possible.
  CG_HD void add_flagged(const OneAlpha<A>&, int, V inside, V above) {
    inside_ = inside_ + inside;
    above_ = above_ + above;
  }
  CG_HD void add_flagged(const AlphaPerElement<A>& source, int i, V inside, V above) {
    add(source, i, weighed(inside, above));
  }

  // The chunk that `block` begins or is in; and its sums, for terms that are summed elsewhere.
  CG_HD int64_t chunk_end(int64_t block) { return sums_of_chunk(block), chunk_end_; }
  CG_HD A* of_chunk() { return chunk_sums_; }

  // A, indexed by the two bits of a state or a code.
  CG_HD SmallTable<V> weights() const {
    const A of[4] = {0, inside_factor_, above_factor_, inside_factor_ + above_factor_};
    return SmallTable<V>(of, 4);
  }

  // Call after them.
  CG_HD void finish(int64_t, const OneAlpha<A>&) {}
  CG_HD void finish(int64_t block, const AlphaPerElement<A>& source) {
    if (to_) return;
    A* sums = sums_of_chunk(block);
    if (a_.alphas.inner == 1) {
      int64_t channel = source.channel;
      for (int i = 0; i < kBlock;) {
        const int64_t left = a_.alphas.channels - channel;
        const int run = left < kBlock - i ? static_cast<int>(left) : kBlock - i;
        int j = 0;
        for (A* to = sums + channel; j + kCount <= run; j += kCount) {
          Io<A>::store(to + j, Io<A>::load(to + j) + Io<A>::load(terms_ + i + j));
        }
        for (; j < run; ++j) sums[channel + j] += terms_[i + j];
        i += run;
        channel = 0;
      }
    } else {
      for_each_run(a_.alphas, source.channel, source.left, [&](int64_t channel, int first, int last) {
        const uint64_t run = ~uint64_t{0} >> (kBlock - (last - first)) << first;
        V sum(A(0));
        for (int i = first - first % kCount; i < last; i += kCount) {
          sum = sum + select(Lanes<V>::mask(run >> i), Io<A>::load(terms_ + i), V(A(0)));
        }
        sums[channel] += Lanes<V>::sum(sum);
      });
    }
  }

 private:
  CG_HD A* sums_of_chunk(int64_t block) {
    if (block >= chunk_end_) {  // a division takes as long as a block
      const int64_t chunk = block / a_.chunk_blocks;
      chunk_end_ = (chunk + 1) * a_.chunk_blocks;
      chunk_sums_ = static_cast<A*>(a_.partial) + chunk * a_.alphas.channels;
    }
    return chunk_sums_;
  }
  CG_HD V weighed(V inside, V above) const {
    return masked_product(inside, V(inside_factor_)) + mul(above, V(above_factor_));
  }
  CG_HD void flush() {
    if (sum_) *sum_ += Lanes<V>::sum(total_ + weighed(inside_, above_));
    total_ = inside_ = above_ = V(A(0));
  }

  const Backward& a_;
  const A inside_factor_, above_factor_;
  A *sum_ = nullptr, *chunk_sums_ = nullptr,
    *to_ = nullptr;  // to_: the sums of a block's elements, contiguous
  int64_t chunk_end_ = 0;
  V total_ = V(A(0)), inside_ = total_, above_ = total_;
  A terms_[kBlock];
};

}  // namespace
}  // namespace cg::CG_ISA
