// Walking the blocks of a tensor with the alpha of each element, and reading and writing what is packed.

namespace cg::CG_ISA {

// Two packs, in an order that load_two and store_two share; what is stored is rounded to T.
template <class T>
CG_HD auto load_two(const T* p) {
  using P = Pack<compute_t<T>>;
  return Two<P>{Io<T>::load(p), Io<T>::load(p + Lanes<P>::kCount)};
}
// From the given place in a block, zero where a bit of the block's is not set: a pack in order, or two in load_two's.
template <class T>
CG_HD auto load_where(const T* block, uint64_t bits, int first) {
  using P = Pack<compute_t<T>>;
  return select(Lanes<P>::mask(bits >> first), Io<T>::load(block + first), P(compute_t<T>(0)));
}
template <class T, class Bits>
CG_HD auto load_two_where(const T* block, Bits bits, int first) {
  using P = Pack<compute_t<T>>;
  return Two<P>{load_where(block, bits, first), load_where(block, bits, first + Lanes<P>::kCount)};
}
template <class T, class P>
CG_HD void store_two(T* p, Two<P> v, bool stream) {
  if (stream) Io<T>::stream(p, v.first), Io<T>::stream(p + Lanes<P>::kCount, v.second);
  else Io<T>::store(p, v.first), Io<T>::store(p + Lanes<P>::kCount, v.second);
}

namespace {

// One alpha for the whole block.
template <class A>
struct Uniform {
  Pack<A> alpha, inverse;
  int64_t channel;
  CG_HD Pack<A> alpha_at(int) const { return alpha; }
  CG_HD Pack<A> inverse_at(int) const { return inverse; }
  CG_HD const Uniform& of(int64_t) const { return *this; }
};

// An alpha for each element, read from two arrays; the first one's channel, and how many elements of it come.
template <class A>
struct Varying {
  const A* alpha;
  const A* inverse;
  int64_t channel, left;
  CG_HD Pack<A> alpha_at(int i) const { return Lanes<Pack<A>>::load(alpha + i); }
  CG_HD Pack<A> inverse_at(int i) const { return Lanes<Pack<A>>::load(inverse + i); }
  CG_HD const Varying& of(int64_t) const { return *this; }
};

// The same of every block, where channels are the innermost dimension.
template <class A>
struct Columns {
  const A* alpha;
  const A* inverse;
  int64_t channels;
  CG_HD Varying<A> of(int64_t block) const {
    const int64_t channel = block * kBlock % channels;
    return {alpha + channel, inverse + channel, channel, 1};
  }
};

// body(channel, first, last) for each run of one channel within a block, given the first one's.
template <class Body>
CG_HD void for_each_run(const Steps& steps, int64_t channel, int64_t left, const Body& body) {
  for (int first = 0; first < kBlock;) {
    const int last = left < kBlock - first ? first + static_cast<int>(left) : kBlock;
    body(channel, first, last);
    first = last;
    left = steps.inner;
    if (++channel == steps.channels) channel = 0;
  }
}

// body(first, last, source) for ranges of blocks, with the source of alpha that fits them; without kSteps the source
// only tells whether a block has one channel, and which. Blocks of more channels than one come one by one.
template <class A, bool kSteps = true, class Body>
CG_HD void for_each_range(const Steps& steps, int64_t begin, int64_t end, const Body& body) {
  const A* alpha = static_cast<const A*>(steps.alpha);
  const A* inverse = static_cast<const A*>(steps.inverse);
  const auto uniform = [&](int64_t channel) {
    if constexpr (kSteps) return Uniform<A>{Pack<A>(alpha[channel]), Pack<A>(inverse[channel]), channel};
    else return Uniform<A>{{}, {}, channel};
  };
  if (steps.channels == 1) {
    body(begin, end, uniform(0));
    return;
  }
  // The channel that a block begins in, and where that ends: counted, as divisions take as long as a block.
  int64_t channel = begin * kBlock / steps.inner, channel_end = (channel + 1) * steps.inner;
  channel %= steps.channels;
  const int64_t step = kBlock % steps.channels;
  for (int64_t block = begin; block < end;) {
    if (steps.inner == 1) {
      body(block, block + 1, Varying<A>{alpha + channel, inverse + channel, channel, 1});
      ++block;
      channel += step;
      if (channel >= steps.channels) channel -= steps.channels;
      continue;
    }
    for (; channel_end <= block * kBlock; channel_end += steps.inner) {
      if (++channel == steps.channels) channel = 0;
    }
    const int64_t whole = channel_end / kBlock;
    if (block < whole) {
      const int64_t last = whole < end ? whole : end;
      body(block, last, uniform(channel));
      block = last;
      continue;
    }
    A alphas[kBlock], inverses[kBlock];
    const int64_t left = channel_end - block * kBlock;
    if constexpr (kSteps) {
      for_each_run(steps, channel, left, [&](int64_t channel, int first, int last) {
        for (int i = first; i < last; ++i) alphas[i] = alpha[channel], inverses[i] = inverse[channel];
      });
    }
    body(block, block + 1, Varying<A>{alphas, inverses, channel, left});
    ++block;
  }
}

CG_HD int block_count(int64_t count, int64_t block) {
  const int64_t left = count - block * kBlock;
  return left < kBlock ? static_cast<int>(left) : kBlock;
}

// Asks for the block that is kPrefetchBytes ahead; past the end that is harmless.
template <class T>
CG_HD void prefetch(const T* block) {
  if constexpr (kPrefetchBytes > 0) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(block) + kPrefetchBytes;
    for (size_t i = 0; i < kBlock * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + i));
  }
}

// The last block may be short: it is read from a copy padded with zeros, and written through one.
template <class U>
CG_HD const U* read_block(const U* from, int64_t block, int count, U* copy) {
  if (count == kBlock) return from + block * kBlock;
  for (int i = count; i < kBlock; ++i) copy[i] = U{};
  memcpy(copy, from + block * kBlock, count * sizeof(U));
  return copy;
}

// A block's kWidth bits an element begin at byte block * 8 * kWidth. Whole blocks are copied by a size that the compiler
// knows, which is a few moves instead of a call.
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

CG_HD void write_mask(uint8_t* to, MaskKind kind, int64_t block, int count, uint64_t inside, uint64_t above) {
  if (kind == MaskKind::state) {
    uint64_t words[2];
    pack_states(inside, above, words);
    write_packed<2>(to, block, count, words);
  } else {
    if (kind == MaskKind::positive) inside |= above;
    write_packed<1>(to, block, count, &inside);
  }
}

template <int kWidth>
CG_HD void write_codes_of(uint8_t* to, int64_t block, int count, const uint8_t* codes) {
  if (count == kBlock) return pack_codes<kWidth>(codes, to + block * 8 * kWidth);
  uint64_t words[kWidth];
  pack_codes<kWidth>(codes, reinterpret_cast<uint8_t*>(words));
  write_packed<kWidth>(to, block, count, words);
}
template <int kWidth>
CG_HD void read_codes_of(const uint8_t* from, int64_t block, int count, uint8_t* codes) {
  if (count == kBlock) return unpack_codes<kWidth>(from + block * 8 * kWidth, codes);
  uint64_t words[kWidth];
  read_packed<kWidth>(from, block, count, words);
  unpack_codes<kWidth>(reinterpret_cast<const uint8_t*>(words), codes);
}

void write_codes(uint8_t* to, int64_t block, int count, int width, const uint8_t* codes) {
  switch (width) {
    case 1: return write_codes_of<1>(to, block, count, codes);
    case 2: return write_codes_of<2>(to, block, count, codes);
    case 4: return write_codes_of<4>(to, block, count, codes);
    default: return write_codes_of<8>(to, block, count, codes);
  }
}
void read_codes(const uint8_t* from, int64_t block, int count, int width, uint8_t* codes) {
  switch (width) {
    case 1: return read_codes_of<1>(from, block, count, codes);
    case 2: return read_codes_of<2>(from, block, count, codes);
    case 4: return read_codes_of<4>(from, block, count, codes);
    default: return read_codes_of<8>(from, block, count, codes);
  }
}

template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(bf16{});
    case Dtype::float16: return f(f16{});
  }
}

// What the other kernels are measured by: their loads and stores with nothing between.
void copy(const Copy& args, int64_t begin, int64_t end) {
  const Copy a = args;
  for (int64_t block = begin; block < end; ++block) {
    const float* from = a.from + block * kBlock;
    float* to = a.to + block * kBlock;
#pragma GCC unroll 16
    for (int i = 0; i < kBlock; i += Lanes<Pack<float>>::kCount) {
      const auto v = Io<float>::load(from + i);
      if (a.stream) Io<float>::stream(to + i, v);
      else Io<float>::store(to + i, v);
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
