// dy to dx and to the sums of dalpha, from saved x.
#pragma once

#include <limits>

#include "blocks.h"
#include "quantize.h"
#include "sums.h"

namespace cg::CG_ISA {
namespace {

template <class T, Rounding R, bool kRegular, class Source>
CG_HD void codes_rounding(const T* x, const Source& source, int bits, uint8_t* codes) {
  using V = Vec<compute_t<T>>;
  const V q(compute_t<T>((1 << bits) - 1));
  for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
    const V v = Io<T>::load(x + i);
    const auto result = quantize_vec<T, R, kRegular>(v, source.alpha_at(i), source.inverse_at(i), q);
    Lanes<V>::store_codes(codes + i, result.code);
  }
}

template <class T, class Source>
void codes_block(const Backward& a, const T* x, const Source& source, uint8_t* codes) {
  with_rounding(a.rounding, [&](auto rounding) {
    with_regular(a.alphas,
                 [&](auto regular) { codes_rounding<T, rounding.value, regular.value>(x, source, a.bits, codes); });
  });
}

// dy * g'(u); 0 where the gate is shut.
template <class SteT, bool kApproximate, class F>
CG_HD F times_slope_at(F dy, const Point<F>& p) {
  if constexpr (SteT::kNeeds == Needs::nothing) {
    return dy;
  } else {
    const F g = g_at<SteT, kApproximate>(p);
    return select(SteT::gate(p) & (g != F(0)), mul(dy, g), F(0));
  }
}

// dx from x. kApproximate: alphas are regular and dx has 16 bits, which show no error of an approximate g'.
template <class T, class SteT, bool kApproximate, class Source>
CG_HD void dx_run(const T* x, const T* grad_y, T* dx, int64_t count, bool stream, const Source source,
                  Vec<compute_t<T>> q) {
  using V = Vec<compute_t<T>>;
  constexpr int kCount = Lanes<V>::kCount;
  const V inverse_q = V(scalar_of<V>(1)) / q;
  const auto dx_of = [&](auto v, auto dy, int64_t i) {  // of a Vec, a Pair or a Pair of Pairs
    using F = decltype(v);
    const F u = kApproximate ? mul(v, F(source.inverse_at(i))) : v / F(source.alpha_at(i));
    const V alpha = source.alpha_at(i), top = level<T>(q, alpha);
    return times_slope_at<SteT, kApproximate>(dy, Point<F>{v, F(alpha), u, F(q), F(inverse_q), F(top)});
  };
  for (int64_t end = 0; end < count;) {
    int64_t i = end;
    end += kBlock;
    prefetch(x + i);
    prefetch(grad_y + i);
    if constexpr (!std::is_same_v<Source, OneAlpha<compute_t<T>>>) {
      for (; i < end; i += kCount) {
        const V result = round_to<T>(dx_of(Io<T>::load(x + i), Io<T>::load(grad_y + i), i));
        if (stream) Io<T>::stream(dx + i, result);
        else Io<T>::store(dx + i, result);
      }
    } else if constexpr (kChains == 2) {
      for (; i < end; i += 4 * kCount) {
        const int64_t j = i + 2 * kCount;
        const auto result =
            dx_of(Pair{load_pair(x + i), load_pair(x + j)}, Pair{load_pair(grad_y + i), load_pair(grad_y + j)}, i);
        store_pair(dx + i, result.first, stream);
        store_pair(dx + j, result.second, stream);
      }
    } else {
      for (; i < end; i += 2 * kCount) {
        const Pair<V> v = load_pair(x + i), dy = load_pair(grad_y + i);
        store_pair(dx + i, Pair<V>{dx_of(v.first, dy.first, i), dx_of(v.second, dy.second, i)}, stream);
      }
    }
  }
}

// The same for whole blocks with one regular alpha, in half the instructions. As long as x is moderate (no NaN, and
// nothing on the way to g' overflows) the gate is one comparison, in 16 bits for 16-bit x. Other x are redone by
// dx_run. Not inlined, as its constants fill the registers.
template <class T, class SteT>
__attribute__((noinline)) void dx_fast(const Backward& a, const T* x, const T* grad_y, T* dx, int64_t count,
                                       bool stream, const OneAlpha<float>& source) {
  using Key = CompareKey<T>;
  using Element = typename Key::Element;
  using Each = decltype(Key().floats());
  constexpr bool kFour = std::is_same_v<Each, Vec<float>>;  // keys in turn, as a pair of floats is two chains already
  using F = Pair<std::conditional_t<kFour, Pair<Each>, Each>>;
  using Slope = FastSlope<SteT, T, F>;
  const float alpha = static_cast<const float*>(a.alphas.values)[source.channel];
  const float q = static_cast<float>((1 << a.bits) - 1);
  const Slope slope(alpha, q);
  const float most = min_of(Slope::most(alpha, q), std::numeric_limits<float>::max());
  const Element moderate = compare_key_floor<T>(most);
  const auto load = [](const T* p) { return Key::load(reinterpret_cast<const Element*>(p)); };
  const auto floats = [&](const T* p) {
    const auto two = [&](const T* p) { return Pair<Each>{load(p).floats(), load(p + Key::kCount).floats()}; };
    if constexpr (kFour) return F{two(p), two(p + 2 * Key::kCount)};
    else return two(p);
  };
  Key largest;
  const auto store_positive = [&](const T* x, T* dx, Each v) {
    const Key key = load(x), result = Key::masked(Key::greater(key, Key::all(0)), Key::rounded(v));
    largest = Key::max_magnitude(largest, key);
    if (stream) Key::stream(reinterpret_cast<Element*>(dx), result);
    else Key::store(reinterpret_cast<Element*>(dx), result);
  };
  const auto store_two = [&](const T* x, T* dx, const Pair<Each>& v) {
    store_positive(x, dx, v.first);
    store_positive(x + Key::kCount, dx + Key::kCount, v.second);
  };
  for (int64_t end = 0; end < count;) {
    const int64_t begin = end;
    end += kBlock;
    prefetch(x + begin);
    prefetch(grad_y + begin);
    largest = Key::all(0);
#pragma GCC unroll 1
    for (int64_t i = begin; i < end; i += (kFour ? 4 : 2) * Key::kCount) {
      const F result = mul(floats(grad_y + i), slope.at(floats(x + i)));
      if constexpr (kFour) {
        store_two(x + i, dx + i, result.first);
        store_two(x + i + 2 * Key::kCount, dx + i + 2 * Key::kCount, result.second);
      } else {
        store_two(x + i, dx + i, result);
      }
    }
    if (!Key::any_above(largest, moderate)) continue;
    T exact[kBlock];
    dx_run<T, SteT, sizeof(T) == 2>(x + begin, grad_y + begin, exact, kBlock, false, source, Vec<float>(q));
    for (int i = 0; i < kBlock; ++i) {
      if (!(to_float(x[begin + i]) <= most)) dx[begin + i] = exact[i];
    }
  }
}

// A block's terms of dalpha from x, by any rule.
template <class T, class SteT, class Source>
CG_HD void add_terms(const Backward& a, const T* x, const T* grad_y, const Source& source,
                     ChannelSums<compute_t<T>>& sums) {
  using A = compute_t<T>;
  using V = Vec<A>;
  const A top = A((1 << a.bits) - 1);
  const V q(top), inside_factor(inside_value(a.rule, top)), zero(A(0));
  const bool by_code = a.rule == AlphaGrad::exact || a.rule == AlphaGrad::chain;
  uint8_t codes[kBlock];
  if (by_code) codes_block(a, x, source, codes);
  for (int i = 0; i < kBlock; i += Lanes<V>::kCount) {
    const V alpha = source.alpha_at(i), v = Io<T>::load(x + i);
    const Point<V> p{v, alpha, v / alpha, q, V(A(1)) / q, level<T>(q, alpha)};
    V value;
    if (by_code) {
      value = Lanes<V>::load_codes(codes + i);
      if (a.rule == AlphaGrad::chain) value = chain_value(p, value, slope<SteT>(p));
    } else {
      value = select(p.x > p.top, q, select(is_positive(p.x), inside_factor, zero));
    }
    sums.add(source, i, masked_product(Io<T>::load(grad_y + i), value));
  }
}

// dx by g' and dalpha by any rule, from x.
template <class T, class SteT>
void backward_x(const Backward& args, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const Backward a = args;
  const Vec<A> q(A((1 << a.bits) - 1));
  constexpr bool kApproximate = sizeof(T) == 2;
  const auto dx_of = [&](const T* x, const T* grad_y, T* dx, int64_t count, bool stream, const auto& source) {
    if constexpr (CompareKey<T>::kSearchBits > 0 && SteT::kNeeds == Needs::x &&
                  std::is_same_v<std::decay_t<decltype(source)>, OneAlpha<A>>) {
      if constexpr (kFastSlope<SteT, T>) {
        if (a.alphas.regular) return dx_fast<T, SteT>(a, x, grad_y, dx, count, stream, source);
      }
    }
    if (a.alphas.regular) dx_run<T, SteT, kApproximate>(x, grad_y, dx, count, stream, source, q);
    else dx_run<T, SteT, false>(x, grad_y, dx, count, stream, source, q);
  };
  ChannelSums<A> sums(a);
  for_each_range<A>(a.alphas, begin, end, [&](int64_t first, int64_t last, const auto& source) {
    if (!a.partial) {  // all whole blocks at once
      const int64_t whole = last < a.count / kBlock ? last : a.count / kBlock, at = first * kBlock;
      if (first < whole) {
        dx_of(static_cast<const T*>(a.x) + at, static_cast<const T*>(a.grad_y) + at, static_cast<T*>(a.grad_x) + at,
              (whole - first) * kBlock, a.stream, source);
        first = whole;
      }
    }
    for (int64_t block = first; block < last; ++block) {
      const int count = block_count(a.count, block);
      T x_copy[kBlock], dy_copy[kBlock], dx_copy[kBlock];
      const T* x = read_block(static_cast<const T*>(a.x), block, count, x_copy);
      const T* grad_y = read_block(static_cast<const T*>(a.grad_y), block, count, dy_copy);
      if (a.grad_x) {
        const bool whole = count == kBlock;
        T* grad_x = static_cast<T*>(a.grad_x) + block * kBlock;
        T* dx = whole ? grad_x : dx_copy;
        dx_of(x, grad_y, dx, kBlock, whole && a.stream, source);
        if (!whole) memcpy(grad_x, dx_copy, count * sizeof(T));
      }
      if (!a.partial) continue;
      sums.start(block, source);
      add_terms<T, SteT>(a, x, grad_y, source, sums);
      sums.finish(block, source);
    }
  });
}

}  // namespace
}  // namespace cg::CG_ISA
