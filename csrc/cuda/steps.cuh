// alpha where the kernels read it, and the code of x in few GPU instructions.
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
  A alpha = A(0), inverse = A(0), top = A(0);
  bool regular = false;

  CG_D Step(A value, A q, Rounding rounding) {
    alpha = checked(value);
    inverse = reciprocal(alpha, rounding);
    top = level<T>(q, alpha);
    regular = cg::regular<T>(alpha, q);
  }
  Step() = default;
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

// The codes of a pack, NaN for NaN, all of regular steps: `quantize` of the staircase, with the guess from one fma.
// step(i) is the step of element i.
template <class T, Rounding R, class StepOf, int kCount>
CG_D void codes_of(const float (&x)[kCount], const StepOf& step, float q, float (&codes)[kCount]) {
  if constexpr (R == Rounding::ceil) {
    // Numbers from kMagic up to 2 kMagic are the integers: rounding upwards there is ceil.
    constexpr float kMagic = 0x1p23f;
    float below[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float guess = bounded(__fmaf_ru(x[i], step(i).inverse, kMagic), kMagic + 1, kMagic + q);
      codes[i] = guess - (kMagic + 1);
      below[i] = mul(codes[i], step(i).alpha);
    }
    round_levels<T>(below);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(x[i] <= below[i])) codes[i] += 1;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float code = quantize<T, R>(x[i], step(i).alpha, step(i).inverse, q).code;
      codes[i] = x[i] != x[i] ? NAN : code;
    }
  }
}

// Of one number and any step.
template <class T, Rounding R>
CG_D Quantized<compute_t<T>> quantize_one(compute_t<T> x, const Step<T>& step, compute_t<T> q) {
  if (step.regular) return quantize<T, R>(x, step.alpha, step.inverse, q);
  return quantize_any<T, R>(x, step.alpha, q);
}

}  // namespace cg::cuda
