// x to y, to the bits kept for the backward, and to codes; and codes back to y.

namespace cg::CG_ISA {
namespace {

template <class T, Rounding R, bool kRegular, class P>
CG_HD Quantized<P> quantize_pack(P x, P alpha, P inverse, P q) {
  if constexpr (kRegular) return quantize<T, R>(x, alpha, inverse, q);
  else return quantize_any<T, R>(x, alpha, q);
}

template <class T, Rounding R, bool kRegular, bool kCodes, class Source>
void forward_range(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using A = compute_t<T>;
  using P = Pack<A>;
  const Forward a = args;  // a copy of its own: stores through char pointers cannot change it
  const P q(A((1 << a.bits) - 1));
  for (int64_t block = first; block < last; ++block) {
    const int count = block_count(a.count, block);
    T x_copy[kBlock], y_copy[kBlock];
    prefetch(static_cast<const T*>(a.x) + block * kBlock);
    const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
    const bool whole = a.y && count == kBlock, stream = whole && a.stream;
    T* y = whole ? static_cast<T*>(a.y) + block * kBlock : y_copy;
    uint8_t codes[kBlock];
    uint64_t positive = 0, above = 0;
    for (int i = 0; i < kBlock; i += Lanes<P>::kCount) {
      const P v = Io<T>::load(x + i), alpha = source.alpha_at(i);
      const Quantized<P> result = quantize_pack<T, R, kRegular>(v, alpha, source.inverse_at(i), q);
      if (stream) Io<T>::stream(y + i, result.y);
      else Io<T>::store(y + i, result.y);
      positive |= Lanes<P>::bits(is_positive(v)) << i;
      above |= Lanes<P>::bits(v > level<T>(q, alpha)) << i;
      if constexpr (kCodes) Lanes<P>::store_codes(codes + i, result.code);
    }
    if (a.y && count < kBlock) memcpy(static_cast<T*>(a.y) + block * kBlock, y_copy, count * sizeof(T));
    if (a.mask) write_mask(a.mask, a.kind, block, count, positive & ~above, above);
    if constexpr (kCodes) write_codes(a.codes, block, count, packed_width(a.bits), codes);
  }
}

// The staircase for numbers that are no NaN, by a comparison with each threshold: the fastest where these are few, and
// a comparison is no dearer than a look-up. Of one alpha for a group of packs, or of one for each number.
template <class T, Rounding R, int kBits, bool kUniform = true>
struct Comparisons {
  using O = Ordered<T>;
  using F = decltype(O().floats());
  static constexpr int kTop = (1 << kBits) - 1, kPacks = O::kGroup, kStairs = kUniform ? 1 : kPacks;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = true;
  using Found = typename O::Mask[kBits][kPacks];  // the bits of the codes
  O thresholds[kStairs][kTop], levels[kStairs][kTop];  // of the codes from 1 up

  CG_HD Comparisons(float alpha, float) { make(F(alpha), 0); }
  CG_HD Comparisons(const float* alpha, const float*, float) {
    for (int i = 0; i < kPacks; ++i) make(O::load_floats(alpha + i * O::kCount), i);
  }
  CG_HD O top(int i) const { return levels[kUniform ? 0 : i][kTop - 1]; }

  // The levels of some packs of x, their codes where kCodes, and where x > 0.
  template <bool kCodes>
  CG_HD void apply(const O (&x)[kPacks], O (&y)[kPacks], Found& found, typename O::Mask (&positive)[kPacks]) const {
    for (int i = 0; i < kPacks; ++i) {
      const auto& threshold = thresholds[kUniform ? 0 : i];
      const auto& level = levels[kUniform ? 0 : i];
      typename O::Mask greater[kTop];
      for (int k = 0; k < kTop; ++k) {
        greater[k] = O::greater(x[i], threshold[k]);
        y[i] = k == 0 ? O::keep(greater[k], level[k]) : O::select(greater[k], level[k], y[i]);
      }
      positive[i] = R == Rounding::nearest ? O::greater(x[i], O::all(0)) : greater[0];  // else the first threshold is 0
      if constexpr (kCodes) {
        found[kBits - 1][i] = greater[kTop / 2];
        if constexpr (kBits == 2) found[0][i] = O::choose(greater[1], greater[2], greater[0]);
      }
    }
  }
  // From the given place in a block's packed codes on.
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    if constexpr (kBits == 1) O::store_bits(block + first / 8, found[0]);
    else O::store_states(block + first / 4, found[0], found[1]);
  }

 private:
  CG_HD void make(F alpha, int i) {
    for (int k = 1; k <= kTop; ++k) {
      O& level = levels[i][k - 1];
      O& threshold = thresholds[i][k - 1];
      level = O::level(mul(F(float(k)), alpha));
      if (k == 1 && R != Rounding::nearest) {
        threshold = O::all(0);
      } else {
        const O below = k == 1 ? O::all(0) : levels[i][k - 2];
        threshold = R == Rounding::ceil ? below : O::floor(mul(below.floats() + level.floats(), F(0.5f)));
      }
    }
  }
};

// The same as small tables in registers, for the few bits for which a search takes less time than the arithmetic. kBits
// comparisons with a threshold each halve the codes that are left; which threshold comes next, and the
// level in the end, are looked up by what came out before: bit d of an index is the comparison d.
template <class T, Rounding R, int kBits>
struct Table {
  using O = Ordered<T>;
  using Element = typename O::Element;
  using Index = typename O::Index;
  static constexpr int kPacks = kBlock / O::kCount;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = Index[kPacks];
  static constexpr int registers(int comparison) {
    return 1 << comparison <= O::kEntries ? 1 : (1 << comparison) / O::kEntries;
  }
  static constexpr int kTop = (1 << kBits) - 1, kLast = kBits - 1, kRegisters = registers(kLast);
  O thresholds[kBits][kRegisters], codes[kRegisters], below[kRegisters], above[kRegisters], highest;

  // For each outcome of the comparisons before the given one, the entry of the lowest code that it leaves.
  static CG_HD void fill(O* packs, int comparison, const Element* of_code) {
    Element entries[kRegisters * O::kCount];
    const int count = registers(comparison) * O::kCount;
    for (int i = 0; i < count; ++i) {
      const int outcome = i / O::kCount * O::kEntries + i % O::kEntries;
      int code = 0;
      for (int d = 0; d < comparison; ++d) code |= (outcome >> d & 1) << (kLast - d);
      entries[i] = of_code[code];
    }
    for (int i = 0; i < registers(comparison); ++i) packs[i] = O::load(entries + i * O::kCount);
  }

  CG_HD Table(float alpha, float) {
    Element all_codes[kTop + 1], all_thresholds[kTop + 1], all_levels[kTop + 1];
    for (int k = 0; k <= kTop; ++k) {
      all_codes[k] = static_cast<Element>(k);
      all_thresholds[k] = ordered_floor<T>(threshold<T, R>(float(k), alpha));
      all_levels[k] = ordered_floor<T>(level<T>(float(k), alpha));
    }
    for (int d = 0; d < kBits; ++d) fill(thresholds[d], d, all_thresholds + (1 << (kLast - d)));
    fill(codes, kLast, all_codes);
    fill(below, kLast, all_levels);
    fill(above, kLast, all_levels + 1);
    highest = O::all(all_levels[kTop]);
  }
  CG_HD O top(int) const { return highest; }

  // All packs of a block side by side, as a comparison waits for the one before it.
  template <bool kCodes>
  CG_HD void apply(const O (&x)[kPacks], O (&y)[kPacks], Found& found, typename O::Mask (&positive)[kPacks]) const {
    Index index[kPacks];
    for (int i = 0; i < kPacks; ++i) {
      index[i] = O::indices(O::kIndexStart);
      positive[i] = O::greater(x[i], O::all(0));
    }
    search<kCodes>(x, index, found, y);
  }
  static CG_HD void store_codes(uint8_t* block, int first, int, const Found& found) {
    constexpr int kWidth = packed_width(kBits);
    O::template store_codes<kWidth>(block + first * kWidth / 8, found);
  }

 private:
  template <bool kCodes, int kComparison = 0>
  CG_HD void search(const O (&x)[kPacks], Index (&index)[kPacks], Found& found, O (&levels)[kPacks]) const {
    constexpr int kCount = registers(kComparison);
    O at[kPacks];
    typename O::Mask greater[kPacks];
    for (int i = 0; i < kPacks; ++i) {
      at[i] = O::template look_up<kCount>(thresholds[kComparison], index[i]);
      greater[i] = O::greater(x[i], at[i]);
    }
    if constexpr (kComparison < kLast) {
      for (int i = 0; i < kPacks; ++i) index[i] = O::raise(index[i], greater[i], O::kIndexUnit << kComparison);
      search<kCodes, kComparison + 1>(x, index, found, levels);
    } else {
      for (int i = 0; i < kPacks; ++i) {  // under ceil a threshold is the level below it
        const O low = R == Rounding::ceil ? at[i] : O::template look_up<kCount>(below, index[i]);
        levels[i] = O::select(greater[i], O::template look_up<kCount>(above, index[i]), low);
        if constexpr (kCodes) found[i] = O::raise(O::whole(O::template look_up<kCount>(codes, index[i])), greater[i], 1);
      }
    }
  }
};

// The same by arithmetic, where a search takes longer, of one alpha or of one for each number. In 16 bits x / alpha
// rounded down is the code or one less, and the threshold above it tells: rounding moves a level by at most half the
// distance u of the numbers of T, and u < 2 alpha where the steps are regular; x and the levels are numbers of T, and the
// error of x / alpha is far below u / alpha.
template <class T, Rounding R, bool kUniform = true>
struct Guess {
  using O = Ordered<T>;
  using F = decltype(O().floats());
  static constexpr int kPacks = O::kGroup, kStairs = kUniform ? 1 : kPacks;
  static constexpr Rounding kRounding = R;
  static constexpr bool kFewInstructions = false;
  using Found = typename O::Index[kPacks];
  F alpha[kStairs], inverse[kStairs], q;
  O highest[kStairs];

  CG_HD Guess(float step, float top) : q(top) { make(F(step), F(reciprocal(step, R)), 0); }
  CG_HD Guess(const float* steps, const float* inverses, float top) : q(top) {
    for (int i = 0; i < kPacks; ++i) {
      const int at = i * O::kCount;
      make(O::load_floats(steps + at), O::load_floats(inverses + at), i);
    }
  }
  CG_HD O top(int i) const { return highest[kUniform ? 0 : i]; }

  template <bool kCodes>
  CG_HD void apply(const O (&x)[kPacks], O (&y)[kPacks], Found& found, typename O::Mask (&positive)[kPacks]) const {
    for (int i = 0; i < kPacks; ++i) {
      const F step = alpha[kUniform ? 0 : i], factor = inverse[kUniform ? 0 : i];
      positive[i] = O::greater(x[i], O::all(0));
      if constexpr (sizeof(T) == sizeof(float)) {
        const Quantized<F> number = quantize_number<T, R>(x[i].floats(), step, factor, q);
        y[i] = O::level(number.y);
        if constexpr (kCodes) found[i] = number.code;
      } else {
        const O from_zero = O::keep(positive[i], x[i]);
        const F code = floor(min_of(mul(from_zero.floats(), factor), q - F(1.0f)));
        const O low = O::level(mul(code, step)), high = O::level(mul(code + F(1.0f), step));
        typename O::Mask greater;
        if constexpr (R == Rounding::ceil) {
          greater = O::greater(from_zero, low);
        } else {
          F middle = mul(low.floats() + high.floats(), F(0.5f));
          if constexpr (R == Rounding::hwgq) middle = select(code > F(0.0f), middle, F(0.0f));
          greater = O::mask(from_zero.floats() > middle);
        }
        y[i] = O::select(greater, high, low);
        if constexpr (kCodes) found[i] = O::raise(O::whole(code), greater, 1);
      }
    }
  }
  static CG_HD void store_codes(uint8_t* block, int first, int bits, const Found& found) {
    if (packed_width(bits) == 4) O::template store_codes<4>(block + first / 2, found);
    else O::template store_codes<8>(block + first, found);
  }

 private:
  CG_HD void make(F step, F factor, int i) {
    alpha[i] = step;
    inverse[i] = factor;
    highest[i] = O::level(mul(q, step));
  }
};

template <class T, bool kCodes, class Staircase, class Source>
void forward_ordered(const Forward& args, int64_t first, int64_t last, const Source& source) {
  using O = Ordered<T>;
  using Element = typename O::Element;
  constexpr int kPacks = Staircase::kPacks;
  constexpr bool kUniform = std::is_same_v<Source, Uniform<float>>;
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
      O held[kBlock / O::kCount];
      bool any_nan;
      if constexpr (O::kHolds) {
        for (int i = 0; i < kBlock / O::kCount; ++i) {
          const Element* p = x + i * O::kCount;
          held[i] = stream ? O::load_unseen(p) : O::load(p);
        }
        any_nan = O::any_nan(held);
      } else {
        any_nan = O::any_nan(x);
      }
      if (any_nan) {
        forward_range<T, Staircase::kRounding, true, kCodes>(args, block, block + 1, source.of(block));
        for (int first = 0; first < kBlock; first += kPacks * O::kCount) staircase_at(first);  // which may count
        continue;
      }
      prefetch(x);
      Element y_unused[kBlock];
      Element* y = y_of_all ? y_of_all + block * kBlock : y_unused;
      uint8_t* mask = mask_of_all + block * mask_bytes;
      for (int first = 0; first < kBlock; first += kPacks * O::kCount) {
        const auto& staircase = staircase_at(first);
        O v[kPacks], levels[kPacks];
        typename Staircase::Found found;
        typename O::Mask positive[kPacks], inside[kPacks], above[kPacks];
        for (int i = 0; i < kPacks; ++i) {
          if constexpr (O::kHolds) v[i] = held[first / O::kCount + i];
          else v[i] = O::load(x + first + i * O::kCount);
        }
        staircase.template apply<kCodes>(v, levels, found, positive);
        for (int i = 0; i < kPacks; ++i) {
          const int at = first + i * O::kCount;
          if (stream) O::stream(y + at, levels[i]);
          else O::store(y + at, levels[i]);
          above[i] = O::greater(v[i], staircase.top(i));
          inside[i] = O::at_most(positive[i], v[i], staircase.top(i));
        }
        if (all_states) O::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::inside) [[likely]] O::store_bits(mask + first / 8, inside);
        else if (kind == MaskKind::state) O::store_states(mask + first / 4, inside, above);
        else if (kind == MaskKind::positive) O::store_bits(mask + first / 8, positive);
        if constexpr (kCodes) Staircase::store_codes(codes_of_all + block * code_bytes, first, bits, found);
      }
    }
  };
  const float q = static_cast<float>((1 << a.bits) - 1);
  if constexpr (kUniform) {
    const Staircase staircase(static_cast<const float*>(a.steps.alpha)[source.channel], q);
    const auto same = [&](int) -> const Staircase& { return staircase; };
    const auto run_known = [&](auto all_states) {
      if (stream) run(same, all_states, std::true_type{});
      else run(same, all_states, std::false_type{});
    };
    if constexpr (!Staircase::kFewInstructions) run(same, std::false_type{}, stream);
    else if constexpr (kCodes) run_known(std::false_type{});  // states beside codes are rare
    else if (kind == MaskKind::state) run_known(std::true_type{});
    else run_known(std::false_type{});
  } else if constexpr (std::is_same_v<Source, Columns<float>>) {
    constexpr int64_t kWidth = kPacks * O::kCount;
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

// Where each alpha is met often, and always in the same place of a group of packs, the staircases of all are made once:
// whether it was done.
template <class T, Rounding R, bool kCodes, int kBits = 1>
bool forward_columns(const Forward& a, int64_t begin, int64_t end) {
  using O = Ordered<T>;
  if constexpr (!O::kGuesses) {
    return false;
  } else {
    const Steps& steps = a.steps;
    const bool often = (end - begin) * kBlock >= 2 * steps.channels;
    if (steps.inner != 1 || steps.channels % (O::kGroup * O::kCount) != 0 || !often) return false;
    const Columns<float> source{static_cast<const float*>(steps.alpha), static_cast<const float*>(steps.inverse),
                                steps.channels};
    if constexpr (kBits <= O::kCompareBits) {
      if (a.bits != kBits) return forward_columns<T, R, kCodes, kBits + 1>(a, begin, end);
      forward_ordered<T, kCodes, Comparisons<T, R, kBits, false>>(a, begin, end, source);
    } else {
      forward_ordered<T, kCodes, Guess<T, R, false>>(a, begin, end, source);
    }
    return true;
  }
}

// What is looked up takes about as long to make as it saves in a block for each level.
template <class T, Rounding R, bool kCodes, int kBits = 1, class Source>
void forward_regular(const Forward& a, int64_t first, int64_t last, const Source& source) {
  using O = Ordered<T>;
  constexpr bool kUniform = std::is_same_v<Source, Uniform<compute_t<T>>>;
  if constexpr (kBits <= O::kSearchBits && (kUniform || kBits <= O::kCompareBits)) {
    if (a.bits != kBits) return forward_regular<T, R, kCodes, kBits + 1>(a, first, last, source);
    if constexpr (kBits <= O::kCompareBits) {
      return forward_ordered<T, kCodes, Comparisons<T, R, kBits, kUniform>>(a, first, last, source);
    } else {
      if (last - first >= 1 << kBits) return forward_ordered<T, kCodes, Table<T, R, kBits>>(a, first, last, source);
    }
  }
  if constexpr (O::kGuesses) forward_ordered<T, kCodes, Guess<T, R, kUniform>>(a, first, last, source);
  else forward_range<T, R, true, kCodes>(a, first, last, source);
}

template <class T, Rounding R, bool kRegular, bool kCodes>
void forward_best(const Forward& a, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  if constexpr (kRegular) {
    if (forward_columns<T, R, kCodes>(a, begin, end)) return;
  }
  for_each_range<A>(a.steps, begin, end, [&](int64_t first, int64_t last, const auto& source) {
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
CG_HD void dequantize_range(const Dequantize& a, int64_t first, int64_t last, const Source& source) {
  using P = Pack<compute_t<T>>;
  for (int64_t block = first; block < last; ++block) {
    dequantize_block<T>(a, block, [&](const uint8_t* codes, T* y, bool stream) {
      for (int i = 0; i < kBlock; i += Lanes<P>::kCount) {
        const P v = level<T>(Lanes<P>::load_codes(codes + i), source.alpha_at(i));
        if (stream) Io<T>::stream(y + i, v);
        else Io<T>::store(y + i, v);
      }
    });
  }
}

// The levels of one alpha in a 16-bit type, looked up in a register. (In float32 a product is as fast.)
template <class T>
CG_HD void dequantize_table(const Dequantize& a, int64_t first, int64_t last, float alpha) {
  using O = Ordered<T>;
  using Element = typename O::Element;
  Element entries[O::kCount];
  for (int i = 0; i < O::kCount; ++i) entries[i] = ordered_floor<T>(level<T>(float(i % O::kEntries), alpha));
  const O levels = O::load(entries);
  for (int64_t block = first; block < last; ++block) {
    dequantize_block<Element>(a, block, [&](const uint8_t* codes, Element* y, bool stream) {
      for (int i = 0; i < kBlock; i += O::kCount) {
        const O level = O::template look_up<1>(&levels, O::load_indices(codes + i));
        if (stream) O::stream(y + i, level);
        else O::store(y + i, level);
      }
    });
  }
}

void dequantize(const Dequantize& args, int64_t begin, int64_t end) {
  const Dequantize a = args;
  with_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = compute_t<T>;
    for_each_range<A>(a.steps, begin, end, [&](int64_t first, int64_t last, const auto& source) {
      constexpr bool kUniform = std::is_same_v<std::decay_t<decltype(source)>, Uniform<A>>;
      if constexpr (sizeof(T) == 2 && Ordered<T>::kSearchBits > 0 && kUniform) {
        const bool fits = 1 << a.bits <= Ordered<T>::kEntries;
        if (fits) return dequantize_table<T>(a, first, last, static_cast<const A*>(a.steps.alpha)[source.channel]);
      }
      dequantize_range<T>(a, first, last, source);
    });
    if (a.stream) stream_fence();
  });
}

}  // namespace
}  // namespace cg::CG_ISA
