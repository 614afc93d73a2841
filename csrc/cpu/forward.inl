// x to y, to the bits kept for the backward, and to codes; and codes back to y.

namespace cg::CG_ISA {
namespace {

template <class T, Rounding R, bool kRegular, class P>
CG_HD Quantized<P> quantize_pack(P x, const StepPack<compute_t<T>>& step, P q) {
  if constexpr (kRegular) return quantize<T, R>(x, step.alpha, step.inverse, q);
  else return quantize_any<T, R>(x, step.alpha, q);
}

template <class T, Rounding R, bool kRegular, bool kCodes, class Source>
CG_HD void forward_block(const Forward& a, int64_t block, const Source& source) {
  using A = compute_t<T>;
  using P = Pack<A>;
  const int count = block_count(a.count, block);
  const P q(A((1 << a.bits) - 1));
  T x_copy[kBlock], y_copy[kBlock];
  const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
  const bool whole = a.y && count == kBlock, stream = whole && a.stream;
  T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
  uint8_t codes[kBlock];
  uint64_t positive = 0, above = 0;
  for (int i = 0; i < kBlock; i += Lanes<P>::kCount) {
    const StepPack<A> step = source.at(i);
    const P v = Io<T>::load(x + i);
    const Quantized<P> result = quantize_pack<T, R, kRegular>(v, step, q);
    if (stream) Io<T>::stream(y + i, result.y);
    else Io<T>::store(y + i, result.y);
    positive |= Lanes<P>::bits(is_positive(v)) << i;
    above |= Lanes<P>::bits(v > level<T>(q, step.alpha)) << i;
    if constexpr (kCodes) Lanes<P>::store_codes(codes + i, result.code);
  }
  if (a.y && count < kBlock) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
  if (a.mask) write_mask(a.mask, a.kind, block, count, positive, above);
  if constexpr (kCodes) write_codes(a.codes, block, count, packed_width(a.bits), codes);
}

#if CG_TABLE_BITS
// The staircase of one alpha in a 16-bit type as two small tables in registers: x is searched in the thresholds, the
// code looked up in the levels. That takes fewer instructions than the arithmetic, and no conversion. (In float32 the
// arithmetic was faster from 2 bits up.)
template <class T, Rounding R, int kBits>
struct Table {
  static constexpr int kTop = (1 << kBits) - 1;
  static constexpr bool kStraight = kBits <= 2;  // one comparison after the other, a level at a time
  Ordered thresholds, levels, top, each_threshold[3], each_level[3];

  explicit CG_HD Table(float alpha) {
    int16_t threshold_bits[Ordered::kCount], level_bits[Ordered::kCount];
    for (int i = 0; i < Ordered::kCount; ++i) {
      const int k = i & kTop;
      threshold_bits[i] = k == 0 ? int16_t{0} : floor_bits<T>(threshold<T, R>(float(k), alpha));
      level_bits[i] = floor_bits<T>(level<T>(float(k), alpha));
    }
    thresholds = Ordered::load(threshold_bits);
    levels = Ordered::load(level_bits);
    top = Ordered::all(level_bits[kTop]);
    if constexpr (kStraight) {
      for (int k = 1; k <= kTop; ++k) {
        each_threshold[k - 1] = Ordered::all(threshold_bits[k]);
        each_level[k - 1] = Ordered::all(level_bits[k]);
      }
    }
  }

  CG_HD Ordered level_of(Ordered x) const {
    if constexpr (!kStraight) {
      return Ordered::look_up(levels, search(x));
    } else {
      Ordered level = Ordered::select(Ordered::greater(x, each_threshold[0]), each_level[0], Ordered::all(0));
      for (int k = 1; k < kTop; ++k) {
        level = Ordered::select(Ordered::greater(x, each_threshold[k]), each_level[k], level);
      }
      return level;
    }
  }

  CG_HD Ordered search(Ordered x) const {
    Ordered code = Ordered::all(0);
    for (int step = 1 << (kBits - 1); step > 0; step /= 2) {
      const Ordered up = Ordered::all(step);
      const Ordered threshold = Ordered::look_up(thresholds, Ordered::add(code, up));
      code = Ordered::add_where(Ordered::greater(x, threshold), code, up);
    }
    return code;
  }
};

template <class T, Rounding R, int kBits, bool kCodes>
CG_HD void forward_table_block(const Forward& a, int64_t block, const Table<T, R, kBits>& table) {
  const int count = block_count(a.count, block);
  int16_t x_copy[kBlock], y_copy[kBlock];
  const int16_t* x = read_block(static_cast<const int16_t*>(a.x), block, count, x_copy);
  const bool whole = a.y && count == kBlock, stream = whole && a.stream;
  int16_t* y = whole ? static_cast<int16_t*>(a.y) + block * kBlock : y_copy;
  uint8_t codes[kBlock];
  uint64_t positive = 0, above = 0;
  const Ordered zero = Ordered::all(0), infinity = Ordered::all(kInfinityBits<T>);
  for (int i = 0; i < kBlock; i += Ordered::kCount) {
    const Ordered v = Ordered::load(x + i);
    const auto is_nan = Ordered::greater(Ordered::magnitude(v), infinity);
    Ordered code, level;
    if constexpr (kCodes) {
      code = table.search(v);
      level = Ordered::look_up(table.levels, code);
    } else {
      level = table.level_of(v);
    }
    level = Ordered::select(is_nan, v, level);
    if (stream) Ordered::stream(y + i, level);
    else Ordered::store(y + i, level);
    const uint64_t nan = Ordered::bits(is_nan);
    positive |= (Ordered::bits(Ordered::greater(v, zero)) | nan) << i;
    above |= (Ordered::bits(Ordered::greater(v, table.top)) & ~nan) << i;
    if constexpr (kCodes) {
      Ordered::store_codes(codes + i, Ordered::select(is_nan, Ordered::all(Table<T, R, kBits>::kTop), code));
    }
  }
  if (a.y && count < kBlock) memcpy(static_cast<int16_t*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
  if (a.mask) write_mask(a.mask, a.kind, block, count, positive, above);
  if constexpr (kCodes) write_codes(a.codes, block, count, packed_width(a.bits), codes);
}

template <class T, Rounding R, bool kCodes, int kBits>
void forward_table(const Forward& args, int64_t begin, int64_t end) {
  const Forward a = args;
  const float* alpha = static_cast<const float*>(a.steps.alpha);
  int64_t channel = 0;
  Table<T, R, kBits> table(alpha[channel]);
  for_each_block<float>(a.steps, begin, end, [&](int64_t block, const auto& source) {
    if constexpr (std::is_same_v<std::decay_t<decltype(source)>, Uniform<float>>) {
      if (source.channel != channel) {
        channel = source.channel;
        table = Table<T, R, kBits>(alpha[channel]);
      }
      forward_table_block<T, R, kBits, kCodes>(a, block, table);
    } else {
      forward_block<T, R, true, kCodes>(a, block, source);
    }
  });
}

#endif  // CG_TABLE_BITS

template <class T, Rounding R, bool kRegular, bool kCodes>
void forward_arithmetic(const Forward& args, int64_t begin, int64_t end) {
  const Forward a = args;  // a copy of its own: stores through char pointers cannot change it
  for_each_block<compute_t<T>>(a.steps, begin, end, [&](int64_t block, const auto& source) {
    forward_block<T, R, kRegular, kCodes>(a, block, source);
  });
}

template <class T, Rounding R, bool kRegular, bool kCodes, int kBits = 1>
void forward_best(const Forward& a, int64_t begin, int64_t end) {
#if CG_TABLE_BITS
  if constexpr (sizeof(T) == 2 && kBits <= CG_TABLE_BITS) {
    if (a.bits == kBits) return forward_table<T, R, kCodes, kBits>(a, begin, end);
    return forward_best<T, R, kRegular, kCodes, kBits + 1>(a, begin, end);
  }
#endif
  forward_arithmetic<T, R, kRegular, kCodes>(a, begin, end);
}

template <class T, Rounding R, bool kRegular>
void forward_rounding(const Forward& a, int64_t begin, int64_t end) {
  if (a.codes) forward_best<T, R, kRegular, true>(a, begin, end);
  else forward_best<T, R, kRegular, false>(a, begin, end);
}

template <class T, bool kRegular>
void forward_typed(const Forward& a, int64_t begin, int64_t end) {
  switch (a.rounding) {
    case Rounding::ceil: return forward_rounding<T, Rounding::ceil, kRegular>(a, begin, end);
    case Rounding::nearest: return forward_rounding<T, Rounding::nearest, kRegular>(a, begin, end);
    case Rounding::hwgq: return forward_rounding<T, Rounding::hwgq, kRegular>(a, begin, end);
  }
}

void forward(const Forward& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
#if CG_ANY_STEPS
    if (!a.steps.regular) forward_typed<T, false>(a, begin, end);
    else
#endif
      forward_typed<T, true>(a, begin, end);
    if (a.stream) stream_fence();
  });
}

// body(codes, y, stream) makes the levels of a block.
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
CG_HD void levels_block(const uint8_t* codes, T* y, bool stream, const Source& source) {
  using P = Pack<compute_t<T>>;
  for (int i = 0; i < kBlock; i += Lanes<P>::kCount) {
    const P v = level<T>(Lanes<P>::load_codes(codes + i), source.at(i).alpha);
    if (stream) Io<T>::stream(y + i, v);
    else Io<T>::store(y + i, v);
  }
}

template <class T>
void dequantize_arithmetic(const Dequantize& args, int64_t begin, int64_t end) {
  const Dequantize a = args;
  for_each_block<compute_t<T>>(a.steps, begin, end, [&](int64_t block, const auto& source) {
    dequantize_block<T>(a, block, [&](const uint8_t* codes, T* y, bool stream) {
      levels_block<T>(codes, y, stream, source);
    });
  });
}

#if CG_TABLE_BITS
// In a 16-bit type the levels of one alpha are looked up in a register.
template <class T>
void dequantize_table(const Dequantize& args, int64_t begin, int64_t end) {
  const Dequantize a = args;
  const auto levels_of = [](float alpha) {
    int16_t bits[Ordered::kCount];
    for (int i = 0; i < Ordered::kCount; ++i) bits[i] = floor_bits<T>(level<T>(float(i % (1 << CG_TABLE_BITS)), alpha));
    return Ordered::load(bits);
  };
  const float* alpha = static_cast<const float*>(a.steps.alpha);
  int64_t channel = 0;
  Ordered levels = levels_of(alpha[channel]);
  for_each_block<float>(a.steps, begin, end, [&](int64_t block, const auto& source) {
    dequantize_block<T>(a, block, [&](const uint8_t* codes, T* y, bool stream) {
      if constexpr (std::is_same_v<std::decay_t<decltype(source)>, Uniform<float>>) {
        if (source.channel != channel) levels = levels_of(alpha[channel = source.channel]);
        int16_t* to = reinterpret_cast<int16_t*>(y);
        for (int i = 0; i < kBlock; i += Ordered::kCount) {
          const Ordered level = Ordered::look_up(levels, Ordered::load_codes(codes + i));
          if (stream) Ordered::stream(to + i, level);
          else Ordered::store(to + i, level);
        }
      } else {
        levels_block<T>(codes, y, stream, source);
      }
    });
  });
}
#endif  // CG_TABLE_BITS

void dequantize(const Dequantize& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    bool done = false;
#if CG_TABLE_BITS
    if constexpr (sizeof(T) == 2) {
      done = a.bits <= CG_TABLE_BITS;
      if (done) dequantize_table<T>(a, begin, end);
    }
#endif
    if (!done) dequantize_arithmetic<T>(a, begin, end);
    if (a.stream) stream_fence();
  });
}

}  // namespace
}  // namespace cg::CG_ISA
