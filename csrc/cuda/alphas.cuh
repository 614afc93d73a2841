// Where kernels read alpha, and the staircase in few GPU instructions.
#pragma once

#include "chunk.cuh"

namespace cg::cuda {

// Which elements share an alpha: all, those of each chunk, or none in particular.
enum class AlphaLayout { one, by_chunk, by_element };

// alpha as read, or NaN if it is illegal, so that every level is NaN.
template <class A>
CG_D A checked(A alpha) {
  return alpha > A(0) && alpha < A(INFINITY) ? alpha : A(NAN);
}

template <class T>
struct Alpha {
  using A = compute_t<T>;
  A value = A(0), inverse = A(0);

  Alpha() = default;
  CG_D Alpha(A given, Rounding rounding) : value(checked(given)), inverse(reciprocal(value, rounding)) {}

  CG_D A top(A q) const { return level<T>(q, value); }

  // Whether `quantize_chunk` may be used.
  CG_D bool is_regular(A q) const { return regular<T>(value, q); }
};

// The alphas of consecutive elements, from element `start` on.
template <class Stored>
class AlphaRun {
 public:
  CG_D AlphaRun(const Alphas& alphas, int64_t start) : first_(static_cast<const Stored*>(alphas.values)) {
    end_ = first_ + alphas.channels;
    at_ = first_;
    inner_ = left_ = alphas.inner;
    if (alphas.channels > 1) {
      const int64_t segment = start / alphas.inner;
      at_ += segment % alphas.channels;
      left_ -= start - segment * alphas.inner;
    }
  }
  CG_D Stored next() {
    const Stored value = *at_;
    if (--left_ == 0) {
      left_ = inner_;
      if (++at_ == end_) at_ = first_;
    }
    return value;
  }

 private:
  const Stored *first_, *end_, *at_;
  int64_t inner_, left_;
};

// The alpha of a chunk, if channels are runs of whole chunks. 32 bits: a 64-bit division is a call.
template <class T, class Stored = compute_t<T>>
CG_D Stored alpha_of_chunk(const Alphas& alphas, int64_t chunk) {
  const uint32_t run = static_cast<uint32_t>(alphas.inner / kChunk<T>);
  const uint32_t channel = static_cast<uint32_t>(chunk) / run % static_cast<uint32_t>(alphas.channels);
  return static_cast<const Stored*>(alphas.values)[channel];
}

// Clamps to [low, high]; NaN stays.
CG_D float bounded(float v, float low, float high) {
#if defined(__CUDA_ARCH__)
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  return v;
#else
  return v > high ? high : v < low ? low : v;
#endif
}

// Rounds each to T.
template <class T, int kCount>
CG_D void round_levels(float (&v)[kCount]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t word = round_two<T>(v[i], v[i + 1]);
      v[i] = low_half<T>(word);
      v[i + 1] = high_half<T>(word);
    }
  }
}

// A chunk's codes (NaN for NaN) and its outputs, yet to be rounded to T: the staircase for regular alphas by one fma
// and one comparison. alpha_of(i) is the Alpha of element i.
template <class T, Rounding R, class AlphaOf, int kCount>
CG_D void quantize_chunk(const float (&x)[kCount], const AlphaOf& alpha_of, float q, float (&code)[kCount],
                         float (&y)[kCount]) {
  // Numbers from kMagic to 2 kMagic are integers: the sum is rounded to one, up or down.
  constexpr float kMagic = 0x1p23f;
  if constexpr (R == Rounding::ceil) {
    // The guess is the code or one more, as in `quantize`; here code is one less than it at first.
    float below[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      code[i] = bounded(__fmaf_ru(x[i], alpha_of(i).inverse, kMagic), kMagic + 1, kMagic + q) - (kMagic + 1);
      below[i] = mul(code[i], alpha_of(i).value);
    }
    round_levels<T>(below);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(x[i] <= below[i])) code[i] += 1;
      y[i] = mul(code[i], alpha_of(i).value);
    }
  } else {
    // The code is k = floor(x / alpha) or k + 1, and T[k + 1] says which. Rounding to T moves a level by at most half
    // the spacing u of T, and u < 2 alpha if `regular`: then x > T[k], or x = T[k] = L[k] where L[k - 1] is that too,
    // and x <= T[k + 2] likewise.
    float upper[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      code[i] = bounded(__fmaf_rd(x[i], alpha_of(i).inverse, kMagic), kMagic, kMagic + (q - 1)) - kMagic;
      y[i] = mul(code[i], alpha_of(i).value);
      upper[i] = mul(code[i] + 1, alpha_of(i).value);
    }
    round_levels<T>(y);
    round_levels<T>(upper);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float middle = mul(y[i] + upper[i], 0.5f);
      const bool over = x[i] > (R == Rounding::hwgq && code[i] == 0 ? 0 : middle);
      if (over) code[i] += 1;
      y[i] = over ? upper[i] : y[i];
    }
  }
}

// One number, any alpha.
template <class T, Rounding R>
CG_D Quantized<compute_t<T>> quantize_one(compute_t<T> x, const Alpha<T>& alpha, compute_t<T> q) {
  if (alpha.is_regular(q)) return quantize<T, R>(x, alpha.value, alpha.inverse, q);
  return quantize_any<T, R>(x, alpha.value, q);
}

}  // namespace cg::cuda
