// What the CPU kernels are told, and where to find them: plain structs and pointers, no ATen, so that the files
// compiled for one instruction set share nothing with the others.
#pragma once

#include <limits>

#include "../math/alpha_grad.h"
#include "../math/bits.h"

namespace cg {

// Work is cut into blocks of 64 elements in memory order: 64 one-bit flags are one word, and a block starts on a byte
// of every packed width.
constexpr int kBlock = 64;

// alpha and its reciprocal in the compute type. Element i has channel (i / inner) % channels. Where inner is 1 the
// arrays go on for kBlock more entries, wrapping round, so that a block reads its own run of them. They are null for a
// backward from kept bits, which asks for no value of alpha.
struct Steps {
  const void* alpha = nullptr;
  const void* inverse = nullptr;
  int64_t channels = 1, inner = 1;
  bool regular = true;  // staircase.h
};

struct Forward {
  Dtype dtype;
  Rounding rounding;
  int bits;
  int64_t count;
  Steps steps;
  const void* x;
  void* y;         // may be x itself, or null where codes alone are wanted
  uint8_t* mask;   // null where `kind` is nothing
  MaskKind kind;
  uint8_t* codes;  // or null
  bool stream;     // store past the caches: y is 64-byte aligned and larger than they are
};

struct Backward {
  Dtype dtype;
  Ste ste;
  Rounding rounding;
  AlphaGrad rule;
  int bits;
  int64_t count;
  Steps steps;
  const void* grad_y;
  const void* x;         // or null: then mask and codes say what is known of it
  const uint8_t* mask;
  MaskKind kind;
  const uint8_t* codes;
  void* grad_x;          // or null
  void* partial;         // sums of dy * A, [chunks, channels], zeroed; null where alpha is fixed
  int64_t chunk_blocks;  // blocks per chunk: a function of count alone, so that the sums do not depend on threads
  bool stream;
};

struct Dequantize {
  Dtype dtype;
  int bits;
  int64_t count;
  Steps steps;
  const uint8_t* codes;
  void* y;
  bool stream;
};

struct TimesSlopes {
  Dtype dtype;
  int bits;
  int64_t count;
  const void* grad_y;
  const uint8_t* codes;
  const void* slopes;    // one for each code, in the compute type
  void* grad_x;
  bool stream;
};

// Blocks of float32 from one place to another.
struct Copy {
  const float* from;
  float* to;
  bool stream;
};

// Each runs blocks [begin, end); with `partial`, whole chunks.
struct Kernels {
  const char* isa;
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);
  void (*times_slopes)(const TimesSlopes&, int64_t begin, int64_t end);
  void (*copy)(const Copy&, int64_t begin, int64_t end);
};

extern const Kernels kKernelsDefault;  // the only one that serves steps that are not regular
#if defined(CG_HAVE_AVX2)
extern const Kernels kKernelsAvx2;
#endif
#if defined(CG_HAVE_AVX512)
extern const Kernels kKernelsAvx512;
#endif

}  // namespace cg
