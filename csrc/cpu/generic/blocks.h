// Walking the blocks of a tensor with the alpha of each element, and reading and writing what is packed.

namespace cg::CG_ISA {

// Pair vectors, in an order that load_pair and store_pair share; what is stored is rounded to T.
template <class T>
CG_HD auto load_pair(const T* p) {
  using V = Vec<compute_t<T>>;
  return Pair<V>{Io<T>::load(p), Io<T>::load(p + Lanes<V>::kCount)};
}
// From the given place in a block, zero where a bit of the block's is not set: a vector in order, or two in load_pair's.
template <class T>
CG_HD auto load_where(const T* block, uint64_t bits, int first) {
  using V = Vec<compute_t<T>>;
  return select(Lanes<V>::mask(bits >> first), Io<T>::load(block + first), V(compute_t<T>(0)));
}
template <class T, class Bits>
CG_HD auto load_pair_where(const T* block, Bits bits, int first) {
  using V = Vec<compute_t<T>>;
  return Pair<V>{load_where(block, bits, first), load_where(block, bits, first + Lanes<V>::kCount)};
}
template <class T, class V>
CG_HD void store_pair(T* p, Pair<V> v, bool stream) {
  if (stream) Io<T>::stream(p, v.first), Io<T>::stream(p + Lanes<V>::kCount, v.second);
  else Io<T>::store(p, v.first), Io<T>::store(p + Lanes<V>::kCount, v.second);
}

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

// An alpha for each element, read from two arrays; the first one's channel, and how many elements of it come.
template <class A>
struct AlphaPerElement {
  const A* alpha;
  const A* inverse;
  int64_t channel, left;
  CG_HD Vec<A> alpha_at(int i) const { return Lanes<Vec<A>>::load(alpha + i); }
  CG_HD Vec<A> inverse_at(int i) const { return Lanes<Vec<A>>::load(inverse + i); }
  CG_HD const AlphaPerElement& of(int64_t) const { return *this; }
};

// The same of every block, where channels are the innermost dimension.
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

// body(channel, first, last) for each run of one channel within a block, given the first one's.
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

// body(first, last, source) for ranges of blocks, with the source of alpha that fits them; without kValues the source
// only tells whether a block has one channel, and which. Blocks of more channels than one come one by one.
template <class A, bool kValues = true, class Body>
CG_HD void for_each_range(const Alphas& alphas, int64_t begin, int64_t end, const Body& body) {
  const A* alpha = static_cast<const A*>(alphas.values);
  const A* inverse = static_cast<const A*>(alphas.inverses);
  const auto one_alpha = [&](int64_t channel) {
    if constexpr (kValues) return OneAlpha<A>{Vec<A>(alpha[channel]), Vec<A>(inverse[channel]), channel};
    else return OneAlpha<A>{{}, {}, channel};
  };
  if (alphas.channels == 1) {
    body(begin, end, one_alpha(0));
    return;
  }
  // The channel that a block begins in, and where that ends: counted, as divisions take as long as a block.
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
    bitpack_states(inside, above, words);
    write_packed<2>(to, block, count, words);
  } else {
    if (kind == MaskKind::positive) inside |= above;
    write_packed<1>(to, block, count, &inside);
  }
}

template <int kWidth>
CG_HD void write_codes_of(uint8_t* to, int64_t block, int count, const uint8_t* codes) {
  if (count == kBlock) return bitpack<kWidth>(codes, to + block * 8 * kWidth);
  uint64_t words[kWidth];
  bitpack<kWidth>(codes, reinterpret_cast<uint8_t*>(words));
  write_packed<kWidth>(to, block, count, words);
}
template <int kWidth>
CG_HD void read_codes_of(const uint8_t* from, int64_t block, int count, uint8_t* codes) {
  if (count == kBlock) return bitunpack<kWidth>(from + block * 8 * kWidth, codes);
  uint64_t words[kWidth];
  read_packed<kWidth>(from, block, count, words);
  bitunpack<kWidth>(reinterpret_cast<const uint8_t*>(words), codes);
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
    for (int i = 0; i < kBlock; i += Lanes<Vec<float>>::kCount) {
      const auto v = Io<float>::load(from + i);
      if (a.stream) Io<float>::stream(to + i, v);
      else Io<float>::store(to + i, v);
    }
  }
  if (a.stream) stream_fence();
}

}  // namespace
}  // namespace cg::CG_ISA
