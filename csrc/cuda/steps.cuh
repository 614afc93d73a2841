// alpha where the kernels read it, and the staircase in few GPU instructions.
#pragma once

#include "vec.cuh"

namespace cg::cuda {

// alpha as read; NaN where it is no legal alpha, so that every level is NaN.
template <class A>
CG_D A checked(A alpha) {
  return alpha > A(0) && alpha < A(INFINITY) ? alpha : A(NAN);
}

template <class T>
struct Step {
  using A = compute_t<T>;
  A alpha = A(0), inverse = A(0);

  Step() = default;
  CG_D Step(A value, Rounding rounding) : alpha(checked(value)), inverse(reciprocal(alpha, rounding)) {}

  CG_D A top(A q) const { return level<T>(q, alpha); }

  // Whether `quantize_pack` may be used.
  CG_D bool simple(A q) const { return regular<T>(alpha, q); }
};

// The alphas of consecutive elements, from element `start` on.
template <class A>
class Run {
 public:
  CG_D Run(const Steps& steps, int64_t start) : first_(static_cast<const A*>(steps.alpha)) {
    end_ = first_ + steps.channels;
    at_ = first_;
    inner_ = left_ = steps.inner;
    if (steps.channels > 1) {
      const int64_t segment = start / steps.inner;
      at_ += segment % steps.channels;
      left_ -= start - segment * steps.inner;
    }
  }
  CG_D A next() {
    const A value = *at_;
    if (--left_ == 0) {
      left_ = inner_;
      if (++at_ == end_) at_ = first_;
    }
    return value;
  }

 private:
  const A *first_, *end_, *at_;
  int64_t inner_, left_;
};

// The one alpha of a pack, where runs are whole packs. 32 bits: a 64-bit division is a call.
template <class T>
CG_D compute_t<T> alpha_of_pack(const Steps& steps, int64_t pack) {
  const uint32_t run = static_cast<uint32_t>(steps.inner / kPack<T>);
  const uint32_t channel = static_cast<uint32_t>(pack) / run % static_cast<uint32_t>(steps.channels);
  return static_cast<const compute_t<T>*>(steps.alpha)[channel];
}

// Into [low, high]; NaN stays.
CG_D float bounded(float v, float low, float high) {
#if defined(__CUDA_ARCH__)
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  return v;
#else
  return v > high ? high : v < low ? low : v;
#endif
}

// Each rounded to T.
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

// The codes of a pack, NaN for NaN, and its outputs, to be rounded to T: the staircase for `simple` steps, by one fma
// and one comparison. step(i) is the step of element i.
template <class T, Rounding R, class StepOf, int kCount>
CG_D void quantize_pack(const float (&x)[kCount], const StepOf& step, float q, float (&code)[kCount],
                        float (&y)[kCount]) {
  // Numbers from kMagic to 2 kMagic are integers: the sum is rounded to one, upwards or downwards.
  constexpr float kMagic = 0x1p23f;
  if constexpr (R == Rounding::ceil) {
    // The guess is the code or one more, as in `quantize`; here code is one less than it at first.
    float below[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      code[i] = bounded(__fmaf_ru(x[i], step(i).inverse, kMagic), kMagic + 1, kMagic + q) - (kMagic + 1);
      below[i] = mul(code[i], step(i).alpha);
    }
    round_levels<T>(below);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(x[i] <= below[i])) code[i] += 1;
      y[i] = mul(code[i], step(i).alpha);
    }
  } else {
    // The code is k = floor(x / alpha) or k + 1, and T[k + 1] says which. Rounding to T moves a level by at most half
    // the distance u of the numbers of T, and u < 2 alpha where `regular`: then x > T[k], or x = T[k] = L[k] where
    // L[k - 1] is that too, and x <= T[k + 2] likewise.
    float upper[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      code[i] = bounded(__fmaf_rd(x[i], step(i).inverse, kMagic), kMagic, kMagic + (q - 1)) - kMagic;
      y[i] = mul(code[i], step(i).alpha);
      upper[i] = mul(code[i] + 1, step(i).alpha);
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

// Of one number and any step.
template <class T, Rounding R>
CG_D Quantized<compute_t<T>> quantize_one(compute_t<T> x, const Step<T>& step, compute_t<T> q) {
  if (regular<T>(step.alpha, q)) return quantize<T, R>(x, step.alpha, step.inverse, q);
  return quantize_any<T, R>(x, step.alpha, q);
}

}  // namespace cg::cuda
