// The kernels of an instruction set. No ATen, so that the files compiled for one set share nothing with the others.
#pragma once

#include "../arguments.h"
#include "../math/norm.h"

namespace cg {

// Work is cut into blocks of 64 elements in memory order: 64 one-bit flags are one word, and a block starts on a byte
// of every packed width. If channels are the innermost dimension, Alphas have kBlock extra entries, wrapped around, so
// that each block reads a contiguous run of them.
constexpr int kBlock = 64;

// Copies blocks of float32.
struct Copy {
  const float* from;
  float* to;
  bool stream;
};

// Codes of `bits` bits to one per byte.
struct UnpackCodes {
  int bits;
  int64_t count;
  const uint8_t* packed;
  uint8_t* codes;
};

// Hadamard's rotation is in tiles: one block, or as many small ones as make 64 elements.
constexpr int64_t hadamard_tile(int64_t size) { return size < kBlock ? kBlock : size; }

// The row, in whole blocks, and the lanes of its sums.
constexpr int64_t norm_scratch(int64_t length) { return (length + kBlock - 1) / kBlock * kBlock + kNormLanes; }

// The signed staircase, compiled in files of its own. Each runs blocks [begin, end). Groups are channels of `alphas`,
// as many as x has, and are never 0 in the forward: kAlphaOfZeros.
struct SignedKernels {
  // Finds the alphas of groups [begin, end): as they are stored, and in the compute type as Alphas have them. Returns
  // whether all are regular.
  bool (*alphas)(const SignedForward&, int64_t begin, int64_t end, void* values, void* inverses);
  void (*forward)(const SignedForward&, int64_t begin, int64_t end);
  void (*dequantize)(const SignedDequantize&, int64_t begin, int64_t end);
  // Tiles [begin, end); scratch is for a tile in the compute type.
  void (*hadamard)(const Hadamard&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end); norm_scratch() numbers of the compute type. weight and bias go on to whole blocks.
  void (*norm)(const Norm&, int64_t begin, int64_t end, void* scratch);
  // Rows [begin, end); room for the numbers of a row in whole blocks, and as much for numbers of two bits, or half for
  // those of more.
  void (*weight_scales)(const WeightScale&, int64_t begin, int64_t end, int32_t* magnitudes, void* more);
};

// Each runs blocks [begin, end); with `partial`, whole chunks.
struct Kernels {
  const char* isa;
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end);
  void (*backward_from_slopes)(const BackwardFromSlopes&, int64_t begin, int64_t end);
  void (*unpack_codes)(const UnpackCodes&, int64_t begin, int64_t end);
  void (*copy)(const Copy&, int64_t begin, int64_t end);
  const SignedKernels& signed_kernels;
};

// The only set that serves irregular alphas.
extern const Kernels kKernelsDefault;
extern const SignedKernels kSignedKernelsDefault;
#if defined(CG_HAVE_AVX2)
extern const Kernels kKernelsAvx2;
extern const SignedKernels kSignedKernelsAvx2;
#endif
#if defined(CG_HAVE_AVX512)
extern const Kernels kKernelsAvx512;
extern const SignedKernels kSignedKernelsAvx512;
#endif
#if defined(CG_HAVE_NEON)
extern const Kernels kKernelsNeon;
extern const SignedKernels kSignedKernelsNeon;
#endif

}  // namespace cg
