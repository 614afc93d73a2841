// dy to dx and to the sums of dalpha, from saved bits, codes or x; and dy to dx by a slope for each code.
#pragma once

#include "alphas.cuh"
#include "reduce.cuh"

namespace cg::cuda {

// A chunk's elements, zero where bit i * kStride of `gate` is not set.
template <class T, int kStride>
CG_D Chunk masked_chunk(Chunk words, uint64_t gate) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      if (!(gate >> (i * kStride) & 1)) words.w[i] = 0;
    } else {
      const uint32_t low = gate >> (2 * i * kStride) & 1, high = gate >> ((2 * i + 1) * kStride) & 1;
      words.w[i] &= (low | high << 16) * 0xffffu;
    }
  }
  return words;
}

// dx = dy where the 1-bit mask is set. T is any type of the size: numbers pass bit for bit.
template <class T>
__global__ void __launch_bounds__(kThreads) qrelu_backward_mask_kernel(const Backward a, bool aligned) {
  for_each_chunk<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          Chunk dy[kUnroll];
          uint64_t gate[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            dy[u] = load_chunk<T>(a.grad_y, first + u * kThreads);
            gate[u] = read_bits<kChunk<T>, 1>(a.mask, first + u * kThreads, kChunk<T>, true);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            store_chunk<T>(a.grad_x, first + u * kThreads, masked_chunk<T, 1>(dy[u], gate[u]));
          }
        }
      },
      [&](int64_t chunk, int count) {
        const int64_t start = chunk * kChunk<T>;
        const uint64_t gate = read_bits<kChunk<T>, 1>(a.mask, chunk, count, aligned && count == kChunk<T>);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          static_cast<T*>(a.grad_x)[start + i] = gate >> i & 1 ? static_cast<const T*>(a.grad_y)[start + i] : T{};
        }
      });
}

// What is saved of x in kWidth bits: the state, or the codes.
template <bool kState, int kWidth>
struct SavedValues {
  uint64_t bits;

  // The gate of dx, from these bits, at every kWidth-th bit.
  CG_D uint64_t gate(Ste ste) const {
    if (ste == Ste::identity) return ~uint64_t{0};
    uint64_t any = bits;
    if (kState && ste == Ste::clipped_relu) return any;  // 1 is inside
    if (kWidth >= 2) any |= any >> 1;
    if (kWidth >= 4) any |= any >> 2;
    if (kWidth >= 8) any |= any >> 4;
    return any;
  }
  // A of dalpha.
  template <class A>
  CG_D A factor(int i, A inside, A q) const {
    const uint32_t value = static_cast<uint32_t>(bits >> (i * kWidth)) & ((1u << kWidth) - 1);
    if constexpr (kState) return value == 2 ? q : value == 1 ? inside : A(0);
    else return A(value);
  }
};

// dx and the partial sum of dalpha for one alpha, from the state or the codes. The gate of dx is the mask, if there is
// one next to the codes. Else it follows from the codes, as rounding is ceil or hwgq: x > 0 is c > 0.
template <class T, bool kState, int kWidth>
__global__ void __launch_bounds__(kThreads) qrelu_backward_saved_kernel(const Backward a, bool aligned) {
  using A = compute_t<T>;
  using Values = SavedValues<kState, kWidth>;
  const A q = A((1 << a.bits) - 1), inside = inside_value(a.rule, q);
  const uint8_t* values = kState ? a.mask : a.codes;
  const bool masked = !kState && a.kind != MaskKind::nothing;
  A total = A(0);
  for_each_chunk<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          Chunk words[kUnroll];
          Values saved[kUnroll];
          uint64_t mask[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t chunk = first + u * kThreads;
            words[u] = load_chunk<T>(a.grad_y, chunk);
            saved[u].bits = read_bits<kChunk<T>, kWidth>(values, chunk, kChunk<T>, true);
            if (masked) mask[u] = read_bits<kChunk<T>, 1>(a.mask, chunk, kChunk<T>, true);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (a.grad_x) {
              const Chunk dx = masked ? masked_chunk<T, 1>(words[u], mask[u])
                                      : masked_chunk<T, kWidth>(words[u], saved[u].gate(a.ste));
              store_chunk<T>(a.grad_x, first + u * kThreads, dx);
            }
            if (a.partial) {
              float dy[kChunk<T>];
              widen_chunk<T>(words[u], dy);
#pragma unroll
              for (int i = 0; i < kChunk<T>; ++i) total += times_slope(dy[i], saved[u].factor(i, inside, q));
            }
          }
        }
      },
      [&](int64_t chunk, int count) {
        const int64_t start = chunk * kChunk<T>;
        const bool whole = aligned && count == kChunk<T>;
        const Values saved{read_bits<kChunk<T>, kWidth>(values, chunk, count, whole)};
        const uint64_t gate = masked ? read_bits<kChunk<T>, 1>(a.mask, chunk, count, whole) : saved.gate(a.ste);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const T dy = static_cast<const T*>(a.grad_y)[start + i];
          if (a.grad_x) static_cast<T*>(a.grad_x)[start + i] = gate >> (i * (masked ? 1 : kWidth)) & 1 ? dy : T{};
          if (a.partial) total += times_slope(A(widen(dy)), saved.factor(i, inside, q));
        }
      });
  if (a.partial) sum_blocks(total, static_cast<A*>(a.partial));
}

// Many alphas: dx, and the terms of the sums. kUnit: 1, or a chunk.
template <class T, bool kState, int kWidth, int kUnit>
struct SavedTerms {
  using A = compute_t<T>;
  const Backward& a;
  bool masked;
  A q, inside;

  struct Loaded {
    Chunk dy;
    SavedValues<kState, kWidth> saved;
    uint64_t mask;
  };

  template <int kBits>
  CG_D static uint64_t bits_of(const uint8_t* from, int64_t unit) {
    if constexpr (kUnit == 1) return from[unit * kBits / 8] >> (unit * kBits % 8) & ((1u << kBits) - 1);
    else return read_bits<kUnit, kBits>(from, unit, kUnit, true);
  }
  CG_D Loaded load(int64_t unit) const {
    Loaded loaded;
    if constexpr (kUnit > 1) loaded.dy = load_chunk<T>(a.grad_y, unit);
    loaded.saved.bits = bits_of<kWidth>(kState ? a.mask : a.codes, unit);
    loaded.mask = masked ? bits_of<1>(a.mask, unit) : 0;
    return loaded;
  }
  CG_D void add(int64_t unit, const Loaded& loaded, A (&total)[kUnit]) const {
    const uint64_t gate = masked ? loaded.mask : loaded.saved.gate(a.ste);
    if constexpr (kUnit == 1) {
      const T dy = static_cast<const T*>(a.grad_y)[unit];
      if (a.grad_x) static_cast<T*>(a.grad_x)[unit] = gate & 1 ? dy : T{};
      total[0] += times_slope(A(widen(dy)), loaded.saved.factor(0, inside, q));
    } else {
      if (a.grad_x) {
        store_chunk<T>(a.grad_x, unit,
                       masked ? masked_chunk<T, 1>(loaded.dy, gate) : masked_chunk<T, kWidth>(loaded.dy, gate));
      }
      float dy[kUnit];
      widen_chunk<T>(loaded.dy, dy);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) total[k] += times_slope(dy[k], loaded.saved.factor(k, inside, q));
    }
  }
};

template <class T, bool kState, int kWidth, int kUnit>
__global__ void __launch_bounds__(kThreads) qrelu_backward_saved_channels_kernel(const Backward a) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  const SavedTerms<T, kState, kWidth, kUnit> terms{a, !kState && a.kind != MaskKind::nothing, q,
                                                   inside_value(a.rule, q)};
  sum_channel<kUnit>(a.alphas, a.count, static_cast<A*>(a.partial), [&](int64_t, const auto& loop) { loop(terms); });
}

template <class T>
CG_D compute_t<T> code_by_bisection(Rounding rounding, compute_t<T> x, compute_t<T> alpha, compute_t<T> q) {
  switch (rounding) {
    case Rounding::ceil: return quantize_any<T, Rounding::ceil>(x, alpha, q).code;
    case Rounding::nearest: return quantize_any<T, Rounding::nearest>(x, alpha, q).code;
    default: return quantize_any<T, Rounding::hwgq>(x, alpha, q).code;
  }
}

// Whether a rule needs the code itself.
CG_D bool needs_code(AlphaGrad rule) { return rule == AlphaGrad::exact || rule == AlphaGrad::chain; }

// One element of the backward from x: dx before rounding, and the term of dalpha if `sum`.
template <class A>
struct Gradients {
  A dx, term;
};
template <class T, class SteT>
CG_D Gradients<compute_t<T>> gradients(const Backward& a, compute_t<T> x, compute_t<T> dy, compute_t<T> alpha,
                                       bool sum) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  const Point<A> p{x, alpha, x / alpha, q, A(1) / q, level<T>(q, alpha)};
  const A g = slope<SteT>(p);
  A factor = A(0);
  if (sum) {
    if (needs_code(a.rule)) {
      factor = code_by_bisection<T>(a.rounding, x, alpha, q);
      if (a.rule == AlphaGrad::chain) factor = chain_value(p, factor, g);
    } else {
      factor = select(x > p.top, q, select(is_positive(x), inside_value(a.rule, q), A(0)));
    }
  }
  return {times_slope(dy, g), times_slope(dy, factor)};
}

// The same for a chunk and regular alphas; alpha_of(i) is that of element i. The terms are added to total[i], or
// total[0].
template <class T, class SteT, class AlphaOf, int kTotals>
CG_D Chunk gradients_of_chunk(const Backward& a, const Chunk& x_chunk, const Chunk& dy_chunk, const AlphaOf& alpha_of,
                              bool sum, float (&total)[kTotals]) {
  const float q = static_cast<float>((1 << a.bits) - 1), inverse_q = 1 / q;
  float x[kChunk<T>], dy[kChunk<T>], code[kChunk<T>] = {};
  widen_chunk<T>(x_chunk, x);
  widen_chunk<T>(dy_chunk, dy);
  if (sum && needs_code(a.rule)) {
    float y[kChunk<T>];
    switch (a.rounding) {
      case Rounding::ceil: quantize_chunk<T, Rounding::ceil>(x, alpha_of, q, code, y); break;
      case Rounding::nearest: quantize_chunk<T, Rounding::nearest>(x, alpha_of, q, code, y); break;
      case Rounding::hwgq: quantize_chunk<T, Rounding::hwgq>(x, alpha_of, q, code, y); break;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    const Alpha<T>& own = alpha_of(i);
    const Point<float> p{x[i], own.value, quotient(x[i], own.value, own.inverse), q, inverse_q, own.top(q)};
    const float g = slope<SteT>(p);
    if (sum) {
      float factor = fminf(code[i], q);  // of NaN it is q
      if (a.rule == AlphaGrad::chain) factor = chain_value(p, factor, g);
      else if (a.rule != AlphaGrad::exact)
        factor = select(p.x > p.top, q, select(is_positive(p.x), inside_value(a.rule, q), 0.f));
      total[i % kTotals] += times_slope(dy[i], factor);
    }
    dy[i] = times_slope(dy[i], g);
  }
  return round_chunk<T>(dy);
}

// dx, and the partial sum if there is one alpha.
template <class T, class SteT, AlphaLayout kLayout>
__global__ void __launch_bounds__(kThreads) qrelu_backward_x_kernel(const Backward a, bool aligned) {
  using A = compute_t<T>;
  const A q = A((1 << a.bits) - 1);
  Alpha<T> own;
  if constexpr (kLayout == AlphaLayout::one) own = Alpha<T>(static_cast<const A*>(a.alphas.values)[0], a.rounding);
  const bool sum = kLayout == AlphaLayout::one && a.partial;  // many alphas: qrelu_backward_x_channels_kernel
  A total[1] = {};
  const auto one_by_one = [&](int64_t start, int count) {
    AlphaRun<A> alphas(a.alphas, start);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const Gradients<A> g =
          gradients<T, SteT>(a, widen(static_cast<const T*>(a.x)[start + i]),
                             widen(static_cast<const T*>(a.grad_y)[start + i]), checked(alphas.next()), sum);
      if (a.grad_x) static_cast<T*>(a.grad_x)[start + i] = narrow<T>(g.dx);
      total[0] += g.term;
    }
  };
  for_each_chunk<T>(
      a.count, aligned && kLayout != AlphaLayout::by_element,
      [&](int64_t first) {
        if constexpr (kVector<T> && kLayout != AlphaLayout::by_element) {
          Chunk x[kUnroll], dy[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            x[u] = load_chunk<T>(a.x, first + u * kThreads);
            dy[u] = load_chunk<T>(a.grad_y, first + u * kThreads);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t chunk = first + u * kThreads;
            if constexpr (kLayout == AlphaLayout::by_chunk)
              own = Alpha<T>(alpha_of_chunk<T>(a.alphas, chunk), a.rounding);
            if (own.is_regular(q)) {
              const Chunk dx = gradients_of_chunk<T, SteT>(a, x[u], dy[u], [&](int) { return own; }, sum, total);
              if (a.grad_x) store_chunk<T>(a.grad_x, chunk, dx);
            } else {
              one_by_one(chunk * kChunk<T>, kChunk<T>);
            }
          }
        }
      },
      [&](int64_t chunk, int count) { one_by_one(chunk * kChunk<T>, count); });
  if (sum) sum_blocks(total[0], static_cast<A*>(a.partial));
}

// Many alphas: dx, and the terms of the sums, element by element. kUnit: 1, or a chunk. kInnermost: channels are the
// innermost dimension, so that a chunk has kUnit of them, from `channel` on.
template <class T, class SteT, int kUnit, bool kInnermost>
struct XTerms {
  using A = compute_t<T>;
  const Backward& a;
  int64_t channel;

  struct Loaded {};
  CG_D Loaded load(int64_t) const { return {}; }
  CG_D void add(int64_t unit, Loaded, A (&total)[kUnit]) const {
#pragma unroll 1
    for (int k = 0; k < kUnit; ++k) {
      const int64_t i = unit * kUnit + k;
      const A alpha = checked(static_cast<const A*>(a.alphas.values)[kInnermost ? channel + k : channel]);
      const Gradients<A> g = gradients<T, SteT>(a, widen(static_cast<const T*>(a.x)[i]),
                                                widen(static_cast<const T*>(a.grad_y)[i]), alpha, true);
      if (a.grad_x) static_cast<T*>(a.grad_x)[i] = narrow<T>(g.dx);
      // The totals rotate, so that each stays in a register although the loop is not unrolled.
      const A first = total[0] + g.term;
#pragma unroll
      for (int other = 1; other < kUnit; ++other) total[other - 1] = total[other];
      total[kUnit - 1] = first;
    }
  }
};

// The same for whole chunks and regular alphas: element i has alphas[i % kAlphas].
template <class T, class SteT, int kAlphas>
struct XChunkTerms {
  const Backward& a;
  const Alpha<T> (&alphas)[kAlphas];

  struct Loaded {
    Chunk x, dy;
  };
  CG_D Loaded load(int64_t unit) const { return {load_chunk<T>(a.x, unit), load_chunk<T>(a.grad_y, unit)}; }
  CG_D void add(int64_t unit, const Loaded& loaded, float (&total)[kChunk<T>]) const {
    const auto alpha_of = [&](int i) { return alphas[i % kAlphas]; };
    const Chunk dx = gradients_of_chunk<T, SteT>(a, loaded.x, loaded.dy, alpha_of, true, total);
    if (a.grad_x) store_chunk<T>(a.grad_x, unit, dx);
  }
};

template <class T, class SteT, int kUnit, bool kInnermost>
__global__ void __launch_bounds__(kThreads) qrelu_backward_x_channels_kernel(const Backward a) {
  using A = compute_t<T>;
  constexpr int kAlphas = kInnermost ? kUnit : 1;
  sum_channel<kUnit>(a.alphas, a.count, static_cast<A*>(a.partial), [&](int64_t channel, const auto& loop) {
    if constexpr (kUnit > 1) {
      const A q = A((1 << a.bits) - 1);
      Alpha<T> alphas[kAlphas];
      bool is_regular = true;
#pragma unroll
      for (int k = 0; k < kAlphas; ++k) {
        alphas[k] = Alpha<T>(static_cast<const A*>(a.alphas.values)[channel + k], a.rounding);
        is_regular &= alphas[k].is_regular(q);
      }
      if (is_regular) return loop(XChunkTerms<T, SteT, kAlphas>{a, alphas});
    }
    loop(XTerms<T, SteT, kUnit, kInnermost>{a, channel});
  });
}

// dx = dy * slopes[code].
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) backward_from_slopes_kernel(const BackwardFromSlopes a, bool aligned) {
  using A = compute_t<T>;
  constexpr uint32_t kLow = (1u << kWidth) - 1;
  CG_SHARED(A, slopes, 1 << kWidth);
  // 3 bits are stored as 4, and 5 to 7 as 8: the rest of the table is unused.
  for (int code = threadIdx.x; code < 1 << a.bits; code += kThreads)
    slopes[code] = static_cast<const A*>(a.slopes)[code];
  __syncthreads();
  const auto slope_of = [&](uint64_t codes, int i) {
    return slopes[static_cast<uint32_t>(codes >> (i * kWidth)) & kLow];
  };
  for_each_chunk<T>(
      a.count, aligned,
      [&](int64_t first) {
        if constexpr (kVector<T>) {
          Chunk words[kUnroll];
          uint64_t codes[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            words[u] = load_chunk<T>(a.grad_y, first + u * kThreads);
            codes[u] = read_bits<kChunk<T>, kWidth>(a.codes, first + u * kThreads, kChunk<T>, true);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            float v[kChunk<T>];
            widen_chunk<T>(words[u], v);
#pragma unroll
            for (int i = 0; i < kChunk<T>; ++i) v[i] = times_slope(v[i], slope_of(codes[u], i));
            store_chunk<T>(a.grad_x, first + u * kThreads, round_chunk<T>(v));
          }
        }
      },
      [&](int64_t chunk, int count) {
        const int64_t start = chunk * kChunk<T>;
        const uint64_t codes = read_bits<kChunk<T>, kWidth>(a.codes, chunk, count, aligned && count == kChunk<T>);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const A dy = widen(static_cast<const T*>(a.grad_y)[start + i]);
          static_cast<T*>(a.grad_x)[start + i] = narrow<T>(times_slope(dy, slope_of(codes, i)));
        }
      });
}

}  // namespace cg::cuda
