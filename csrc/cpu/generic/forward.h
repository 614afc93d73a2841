// x to y, to the bits saved for the backward, and to codes; and codes back to y.

namespace cg::CG_ISA {
namespace {

template <class T, Rounding R, bool kRegular, class V>
CG_HD Quantized<V> quantize_vec(V x, V alpha, V inverse, V q) {
  if constexpr (kRegular) return quantize<T, R>(x, alpha, inverse, q);
  else return quantize_any<T, R>(x, alpha, q);
}

template <class T, Rounding R, bool kRegular, bool kCodes, class Source>
void forward_range(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const Forward a = args;  // a copy of its own: stores through char pointers cannot change it
  const V q(A((1 << a.bits) - 1));
  for (int64_t block = first; block < last; ++block) {
    const int count = block_count(a.count, block);
    T x_copy[kBlock], y_copy[kBlock];
    prefetch(static_cast<const T*>(a.x) + block * kBlock);
    const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
    const bool whole = a.y && count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
    uint8_t codes[kBlock];
    uint64_t positive = 0, above = 0;
    for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const V v = Io<T>::load(x + i), alpha = source.alpha_at(i);
      const Quantized<V> result = quantize_vec<T, R, kRegular>(v, alpha, source.inverse_at(i), q);
      if (stream) Io<T>::stream(y + i, result.y);
      else Io<T>::store(y + i, result.y);
      positive |= Lanes<V>::bits(is_positive(v)) << i;
      above |= Lanes<V>::bits(v > level<T>(q, alpha)) << i;
      if constexpr (kCodes) Lanes<V>::store_codes(codes + i, result.code);
    }
    if (a.y && count < kBlock) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
    if (a.mask) write_mask(a.mask, a.kind, block, count, positive & ~above, above);
    if constexpr (kCodes) write_codes(a.codes, block, count, packed_width(a.bits), codes);
  }
}

// The staircase for numbers that are no NaN, by a comparison with each threshold: the fastest where these are few, and
// a comparison is no dearer than a look-up. Of one alpha for a group of vectors, or of one for each number.
template <class T, Rounding R, int kBits, bool kOneAlpha = true>
struct CompareStaircase {
  using Key = CompareKey<T>;
  using F = decltype(Key().floats());
  static constexpr int kTop = (1 << kBits) - 1, kVecs = Key::kGroup, kStairs = kOneAlpha ? 1 : kVecs;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = true;
  using Found = typename Key::Mask[kBits][kVecs];  // the bits of the codes
  Key thresholds[kStairs][kTop], levels[kStairs][kTop];  // of the codes from 1 up

  CG_HD CompareStaircase(float alpha, float) { make(F(alpha), 0); }
  CG_HD CompareStaircase(const float* alpha, const float*, float) {
    for (int i = 0; i < kVecs; ++i) make(Key::load_floats(alpha + i * Key::kCount), i);
  }
  CG_HD Key top(int i) const { return levels[kOneAlpha ? 0 : i][kTop - 1]; }

  // The levels of some vectors of x, their codes where kCodes, and where x > 0.
  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    for (int i = 0; i < kVecs; ++i) {
      const auto& threshold = thresholds[kOneAlpha ? 0 : i];
      const auto& level = levels[kOneAlpha ? 0 : i];
      typename Key::Mask greater[kTop];
      for (int k = 0; k < kTop; ++k) {
        greater[k] = Key::greater(x[i], threshold[k]);
        y[i] = k == 0 ? Key::masked(greater[k], level[k]) : Key::select(greater[k], level[k], y[i]);
      }
      positive[i] = R == Rounding::nearest ? Key::greater(x[i], Key::all(0)) : greater[0];  // else the first threshold is 0
      if constexpr (kCodes) {
        found[kBits - 1][i] = greater[kTop / 2];
        if constexpr (kBits == 2) found[0][i] = Key::choose(greater[1], greater[2], greater[0]);
      }
    }
  }
  // From the given place in a block's packed codes on.
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    if constexpr (kBits == 1) Key::store_bits(block + first / 8, found[0]);
    else Key::store_states(block + first / 4, found[0], found[1]);
  }

 private:
  CG_HD void make(F alpha, int i) {
    for (int k = 1; k <= kTop; ++k) {
      Key& level = levels[i][k - 1];
      Key& threshold = thresholds[i][k - 1];
      level = Key::level(mul(F(float(k)), alpha));
      if (k == 1 && R != Rounding::nearest) {
        threshold = Key::all(0);
      } else {
        const Key below = k == 1 ? Key::all(0) : levels[i][k - 2];
        threshold = R == Rounding::ceil ? below : Key::floor(mul(below.floats() + level.floats(), F(0.5f)));
      }
    }
  }
};

// The same as small tables in registers, for the few bits for which a search takes less time than the arithmetic. kBits
// comparisons with a threshold each halve the codes that are left; which threshold comes next, and the
// level in the end, are looked up by what came out before: bit d of an index is the comparison d.
template <class T, Rounding R, int kBits>
struct SearchStaircase {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  using Index = typename Key::Index;
  static constexpr int kVecs = kBlock / Key::kCount;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = Index[kVecs];
  static constexpr int registers(int comparison) {
    return 1 << comparison <= Key::kEntries ? 1 : (1 << comparison) / Key::kEntries;
  }
  static constexpr int kTop = (1 << kBits) - 1, kLast = kBits - 1, kRegisters = registers(kLast);
  Key thresholds[kBits][kRegisters], codes[kRegisters], below[kRegisters], above[kRegisters], highest;

  // For each outcome of the comparisons before the given one, the entry of the lowest code that it leaves.
  static CG_HD void fill(Key* packs, int comparison, const Element* of_code) {
    Element entries[kRegisters * Key::kCount];
    const int count = registers(comparison) * Key::kCount;
    for (int i = 0; i < count; ++i) {
      const int outcome = i / Key::kCount * Key::kEntries + i % Key::kEntries;
      int code = 0;
      for (int d = 0; d < comparison; ++d) code |= (outcome >> d & 1) << (kLast - d);
      entries[i] = of_code[code];
    }
    for (int i = 0; i < registers(comparison); ++i) packs[i] = Key::load(entries + i * Key::kCount);
  }

  CG_HD SearchStaircase(float alpha, float) {
    Element all_codes[kTop + 1], all_thresholds[kTop + 1], all_levels[kTop + 1];
    for (int k = 0; k <= kTop; ++k) {
      all_codes[k] = static_cast<Element>(k);
      all_thresholds[k] = compare_key_floor<T>(threshold<T, R>(float(k), alpha));
      all_levels[k] = compare_key_floor<T>(level<T>(float(k), alpha));
    }
    for (int d = 0; d < kBits; ++d) fill(thresholds[d], d, all_thresholds + (1 << (kLast - d)));
    fill(codes, kLast, all_codes);
    fill(below, kLast, all_levels);
    fill(above, kLast, all_levels + 1);
    highest = Key::all(all_levels[kTop]);
  }
  CG_HD Key top(int) const { return highest; }

  // All vectors of a block side by side, as a comparison waits for the one before it.
  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    Index index[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      index[i] = Key::indices(Key::kIndexStart);
      positive[i] = Key::greater(x[i], Key::all(0));
    }
    search<kCodes>(x, index, found, y);
  }
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    constexpr int kWidth = packed_width(kBits);
    Key::template store_codes<kWidth>(block + first * kWidth / 8, found);
  }

 private:
  template <bool kCodes, int kComparison = 0>
  CG_HD void search(const Key (&x)[kVecs], Index (&index)[kVecs], Found& found, Key (&levels)[kVecs]) const {
    constexpr int kCount = registers(kComparison);
    Key at[kVecs];
    typename Key::Mask greater[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      at[i] = Key::template look_up<kCount>(thresholds[kComparison], index[i]);
      greater[i] = Key::greater(x[i], at[i]);
    }
    if constexpr (kComparison < kLast) {
      for (int i = 0; i < kVecs; ++i) index[i] = Key::raise(index[i], greater[i], Key::kIndexUnit << kComparison);
      search<kCodes, kComparison + 1>(x, index, found, levels);
    } else {
      for (int i = 0; i < kVecs; ++i) {  // under ceil a threshold is the level below it
        const Key low = R == Rounding::ceil ? at[i] : Key::template look_up<kCount>(below, index[i]);
        levels[i] = Key::select(greater[i], Key::template look_up<kCount>(above, index[i]), low);
        if constexpr (kCodes) found[i] = Key::raise(Key::whole(Key::template look_up<kCount>(codes, index[i])), greater[i], 1);
      }
    }
  }
};

// The same by arithmetic, where a search takes longer, of one alpha or of one for each number. In 16 bits x / alpha
// rounded down is the code or one less, and the threshold above it tells: rounding moves a level by at most half the
// distance u of the numbers of T, and u < 2 alpha where the alphas are regular; x and the levels are numbers of T, and the
// error of x / alpha is far below u / alpha.
template <class T, Rounding R, bool kOneAlpha = true>
struct ArithmeticStaircase {
  using Key = CompareKey<T>;
  using F = decltype(Key().floats());
  static constexpr int kVecs = Key::kGroup, kStairs = kOneAlpha ? 1 : kVecs;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = typename Key::Index[kVecs];
  F alpha[kStairs], inverse[kStairs], q;
  Key highest[kStairs];

  CG_HD ArithmeticStaircase(float step, float top) : q(top) { make(F(step), F(reciprocal(step, R)), 0); }
  CG_HD ArithmeticStaircase(const float* alphas, const float* inverses, float top) : q(top) {
    for (int i = 0; i < kVecs; ++i) {
      const int at = i * Key::kCount;
      make(Key::load_floats(alphas + at), Key::load_floats(inverses + at), i);
    }
  }
  CG_HD Key top(int i) const { return highest[kOneAlpha ? 0 : i]; }

  template <bool kCodes>
  CG_HD void apply(const Key (&x)[kVecs], Key (&y)[kVecs], Found& found, typename Key::Mask (&positive)[kVecs]) const {
    for (int i = 0; i < kVecs; ++i) {
      const F step = alpha[kOneAlpha ? 0 : i], factor = inverse[kOneAlpha ? 0 : i];
      positive[i] = Key::greater(x[i], Key::all(0));
      if constexpr (sizeof(T) == sizeof(float)) {
        const Quantized<F> number = quantize_number<T, R>(x[i].floats(), step, factor, q);
        y[i] = Key::level(number.y);
        if constexpr (kCodes) found[i] = number.code;
      } else {
        const Key from_zero = Key::masked(positive[i], x[i]);
        const F code = floor(min_of(mul(from_zero.floats(), factor), q - F(1.0f)));
        const Key low = Key::level(mul(code, step)), high = Key::level(mul(code + F(1.0f), step));
        typename Key::Mask greater;
        if constexpr (R == Rounding::ceil) {
          greater = Key::greater(from_zero, low);
        } else {
          F middle = mul(low.floats() + high.floats(), F(0.5f));
          if constexpr (R == Rounding::hwgq) middle = select(code > F(0.0f), middle, F(0.0f));
          greater = Key::mask(from_zero.floats() > middle);
        }
        y[i] = Key::select(greater, high, low);
        if constexpr (kCodes) found[i] = Key::raise(Key::whole(code), greater, 1);
      }
    }
  }
  static CG_HD void store_codes(uint8_t* block, int first, int bits, const Found& found) {
    if (packed_width(bits) == 4) Key::template store_codes<4>(block + first / 2, found);
    else Key::template store_codes<8>(block + first, found);
  }

 private:
  CG_HD void make(F step, F factor, int i) {
    alpha[i] = step;
    inverse[i] = factor;
    highest[i] = Key::level(mul(q, step));
  }
};

template <class T, bool kCodes, class Staircase, class Source>
void forward_staircase(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  constexpr int kVecs = Staircase::kVecs;
  constexpr bool kOneAlpha = std::is_same_v<Source, OneAlpha<float>>;
  const Forward a = args;
  const Element* const x_of_all = static_cast<const Element*>(a.x);
  Element* const y_of_all = static_cast<Element*>(a.y);
  const MaskKind kind = a.kind;
  const int bits = a.bits, mask_bytes = 8 * mask_width(kind), code_bytes = 8 * packed_width(bits);
  uint8_t *const mask_of_all = a.mask, *const codes_of_all = a.codes;
  const bool stream = a.stream;
  const int64_t whole = last < a.count / kBlock ? last : a.count / kBlock;
  // all_states: whether `kind` is known to be `state`; stream: known or not. Where there is little else, branches show.
  const auto run = [&](const auto& staircase_at, auto all_states, auto stream) {
    for (int64_t block = first; block < whole; ++block) {
      const Element* x = x_of_all + block * kBlock;
      Key held[kBlock / Key::kCount];
      bool any_nan;
      if constexpr (Key::kHoldsBlock) {
        for (int i = 0; i < kBlock / Key::kCount; ++i) {
          const Element* p = x + i * Key::kCount;
          held[i] = stream ? Key::load_without_prefetch(p) : Key::load(p);
        }
        any_nan = Key::any_nan(held);
      } else {
        any_nan = Key::any_nan(x);
      }
      if (any_nan) {
        forward_range<T, Staircase::kRounding, true, kCodes>(args, block, block + 1, source.of(block));
        for (int first = 0; first < kBlock; first += kVecs * Key::kCount) staircase_at(first);  // which may count
        continue;
      }
      prefetch(x);
      Element y_unused[kBlock];
      Element* y = y_of_all ? y_of_all + block * kBlock : y_unused;
      uint8_t* mask = mask_of_all + block * mask_bytes;
      for (int first = 0; first < kBlock; first += kVecs * Key::kCount) {
        const auto& staircase = staircase_at(first);
        Key v[kVecs], levels[kVecs];
        typename Staircase::Found found;
        typename Key::Mask positive[kVecs], inside[kVecs], above[kVecs];
        for (int i = 0; i < kVecs; ++i) {
          if constexpr (Key::kHoldsBlock) v[i] = held[first / Key::kCount + i];
          else v[i] = Key::load(x + first + i * Key::kCount);
        }
        staircase.template apply<kCodes>(v, levels, found, positive);
        for (int i = 0; i < kVecs; ++i) {
          const int at = first + i * Key::kCount;
          if (stream) Key::stream(y + at, levels[i]);
          else Key::store(y + at, levels[i]);
          above[i] = Key::greater(v[i], staircase.top(i));
          inside[i] = Key::at_most(positive[i], v[i], staircase.top(i));
        }
        if (all_states) Key::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::inside) [[likely]] Key::store_bits(mask + first / 8, inside);
        else if (kind == MaskKind::state) Key::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::positive) Key::store_bits(mask + first / 8, positive);
        if constexpr (kCodes) Staircase::store_codes(codes_of_all + block * code_bytes, first, bits, found);
      }
    }
  };
  const float q = static_cast<float>((1 << a.bits) - 1);
  if constexpr (kOneAlpha) {
    const Staircase staircase(static_cast<const float*>(a.alphas.values)[source.channel], q);
    const auto same = [&](int) -> const Staircase& { return staircase; };
    const auto run_known = [&](auto all_states) {
      if (stream) run(same, all_states, std::true_type{});
      else run(same, all_states, std::false_type{});
    };
    if constexpr (!Staircase::kFewInstructions) run(same, std::false_type{}, stream);
    else if constexpr (kCodes) run_known(std::false_type{});  // states beside codes are rare
    else if (kind == MaskKind::state) run_known(std::true_type{});
    else run_known(std::false_type{});
  } else if constexpr (std::is_same_v<Source, AlphaPerColumn<float>>) {
    constexpr int64_t kWidth = kVecs * Key::kCount;
    std::vector<Staircase> staircases;
    for (int64_t i = 0; i < source.channels; i += kWidth) {
      staircases.emplace_back(source.alpha + i, source.inverse + i, q);
    }
    size_t next = first * kBlock / kWidth % staircases.size();
    const auto in_turn = [&](int) -> const Staircase& {
      const Staircase& staircase = staircases[next];
      if (++next == staircases.size()) next = 0;
      return staircase;
    };
    run(in_turn, std::false_type{}, stream);
  } else {
    const auto own = [&](int first) { return Staircase(source.alpha + first, source.inverse + first, q); };
    run(own, std::false_type{}, stream);
  }
  if (whole < last) forward_range<T, Staircase::kRounding, true, kCodes>(args, whole, last, source.of(whole));
}

// Where each alpha is met often, and always in the same place of a group of vectors, the staircases of all are made once:
// whether it was done.
template <class T, Rounding R, bool kCodes, int kBits = 1>
bool forward_columns(const Forward& a, int64_t begin, int64_t end) {
  using Key = CompareKey<T>;
  if constexpr (!Key::kArithmetic) {
    return false;
  } else {
    const Alphas& alphas = a.alphas;
    const bool often = (end - begin) * kBlock >= 2 * alphas.channels;
    if (alphas.inner != 1 || alphas.channels % (Key::kGroup * Key::kCount) != 0 || !often) return false;
    const AlphaPerColumn<float> source{static_cast<const float*>(alphas.values), static_cast<const float*>(alphas.inverses),
                                alphas.channels};
    if constexpr (kBits <= Key::kCompareBits) {
      if (a.bits != kBits) return forward_columns<T, R, kCodes, kBits + 1>(a, begin, end);
      forward_staircase<T, kCodes, CompareStaircase<T, R, kBits, false>>(a, begin, end, source);
    } else {
      forward_staircase<T, kCodes, ArithmeticStaircase<T, R, false>>(a, begin, end, source);
    }
    return true;
  }
}

// What is looked up takes about as long to make as it saves in a block for each level.
template <class T, Rounding R, bool kCodes, int kBits = 1, class Source>
void forward_regular(const Forward& a, int64_t first, int64_t last, const Source& source) {
  using Key = CompareKey<T>;
  constexpr bool kOneAlpha = std::is_same_v<Source, OneAlpha<compute_t<T>>>;
  if constexpr (kBits <= Key::kSearchBits && (kOneAlpha || kBits <= Key::kCompareBits)) {
    if (a.bits != kBits) return forward_regular<T, R, kCodes, kBits + 1>(a, first, last, source);
    if constexpr (kBits <= Key::kCompareBits) {
      return forward_staircase<T, kCodes, CompareStaircase<T, R, kBits, kOneAlpha>>(a, first, last, source);
    } else {
      if (last - first >= 1 << kBits) return forward_staircase<T, kCodes, SearchStaircase<T, R, kBits>>(a, first, last, source);
    }
  }
  if constexpr (Key::kArithmetic) forward_staircase<T, kCodes, ArithmeticStaircase<T, R, kOneAlpha>>(a, first, last, source);
  else forward_range<T, R, true, kCodes>(a, first, last, source);
}

template <class T, Rounding R, bool kRegular, bool kCodes>
void forward_best(const Forward& a, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  if constexpr (kRegular) {
    if (forward_columns<T, R, kCodes>(a, begin, end)) return;
  }
  for_each_range<A>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
    if constexpr (kRegular) forward_regular<T, R, kCodes>(a, first, last, source);
    else forward_range<T, R, false, kCodes>(a, first, last, source);
  });
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
#if CG_ANY_ALPHA
    if (!a.alphas.regular) forward_typed<T, false>(a, begin, end);
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

// The levels of one alpha in a 16-bit type, looked up in a register. (In float32 a product is as fast.)
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
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    for_each_range<A>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
      constexpr bool kOneAlpha = std::is_same_v<std::decay_t<decltype(source)>, OneAlpha<A>>;
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
