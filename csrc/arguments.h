// What an op asks of a kernel, on any device: plain structs and pointers, no ATen.
#pragma once

#include "math/alpha_grad.h"
#include "math/bits.h"

namespace cg {

// alpha in the compute type. Element i has channel (i / inner) % channels. A backward that reads no alpha has none.
struct Alphas {
  const void* values = nullptr;
  int64_t channels = 1, inner = 1;
  // On the CPU: the reciprocals, and whether all are regular (staircase.h). A GPU finds both in the kernel.
  const void* inverses = nullptr;
  bool regular = true;
};

// stream, here and below: on the CPU, whether to store past the caches, as what is written is 64-byte aligned and
// larger than they are.
struct Forward {
  Dtype dtype;
  Rounding rounding;
  int bits;
  int64_t count;
  Alphas alphas;
  const void* x;
  void* y;         // may be x itself; null if codes alone are wanted
  uint8_t* mask;   // null if `kind` is nothing
  MaskKind kind;
  uint8_t* codes;  // or null
  bool stream;
};

struct Backward {
  Dtype dtype;
  Ste ste;
  Rounding rounding;
  AlphaGrad rule;
  int bits;
  int64_t count;
  Alphas alphas;
  const void* grad_y;
  const void* x;         // or null: then mask and codes say what is known of it
  const uint8_t* mask;   // null if `kind` is nothing
  MaskKind kind;
  const uint8_t* codes;  // or null
  void* grad_x;          // or null
  void* partial;         // partial sums of dy * A in the compute type, or null if alpha is fixed
  // On the CPU partial is [chunks, channels] and zeroed. Blocks per chunk are a function of count alone, so that the
  // sums do not depend on the number of threads.
  int64_t chunk_blocks;
  bool stream;
  // On a GPU partial has room for partial_count() sums, and the kernels add these up: grad_alpha is [channels].
  double scale;
  void* grad_alpha;
};

struct Dequantize {
  Dtype dtype;
  int bits;
  int64_t count;
  Alphas alphas;
  const uint8_t* codes;
  void* y;
  bool stream;
};

struct BackwardFromSlopes {
  Dtype dtype;
  int bits;
  int64_t count;
  const void* grad_y;
  const uint8_t* codes;
  const void* slopes;  // one for each code, in the compute type
  void* grad_x;
  bool stream;
};

// The signed staircase. Either alphas are given, or alpha is dynamic: one for each `group` elements, which begin at x.
struct SignedForward {
  Dtype dtype;
  int bits;
  int64_t count;
  Alphas alphas;
  int64_t group;       // 0 if alphas are given
  bf16* group_alphas;  // written: count / group of them
  const void* x;
  void* y;         // on a GPU may be x itself
  uint8_t* mask;   // or null: the bit L[-p] <= x <= L[p]
  uint8_t* codes;  // or null
  bool stream;
  const void* next;  // as many numbers as x has, which are read after it and may be prefetched, or null
};

struct SignedDequantize {
  Dtype dtype;
  int bits;
  int64_t count;
  Alphas alphas;
  int64_t group;  // 0 if alphas are given
  const bf16* group_alphas;
  const uint8_t* codes;
  void* y;
  bool stream;
};

// Blocks of `size` elements, a power of two, multiplied by Hadamard's matrix and then by `scale`.
struct Hadamard {
  Dtype dtype;
  int64_t count, size;
  double scale;
  const void* x;
  void* y;
};

// RMSNorm, or LayerNorm if mean is given, of rows of `length` consecutive elements.
struct Norm {
  Dtype dtype;
  int64_t rows, length;
  double eps;
  bool rounds_twice;  // to x's dtype before the product with weight too
  bool finite;        // whether weight and bias are
  const void* x;
  const void* weight;  // [length], in the compute type
  const void* bias;    // likewise, or null
  void* out;
  void* mean;     // [rows], in the compute type, or null
  void* inverse;  // [rows], in the compute type
};

// The scale of quantized weights: one for each row of `length` consecutive weights.
struct WeightScale {
  Dtype dtype;
  int bits;
  int64_t rows, length;
  const void* weight;
  void* scale;  // [rows], in the compute type
};

// A layer on codes. An image is [height, width, channels]; a weight row, one per output channel, is [kernel height,
// kernel width, channels / groups] in blocks of 32 bytes (docs/spec.md). A Linear is a 1 x 1 convolution of images of
// one pixel.
struct IntegerLayer {
  const uint8_t* codes;  // below 1 << bits
  int bits;
  int64_t images, channels, groups;
  int64_t size[2], kernel[2], stride[2], padding[2], dilation[2], out_size[2];
  const uint8_t* weight;
  int weight_bits;
  int64_t row_bytes, out_channels;
  const float *scale, *offset;  // per output channel
  const int32_t* thresholds;    // [out_channels, levels], or null: then scale and offset decide the code
  int levels;
  uint8_t* out_codes;  // [images, out_size, out_channels], or null
  float* out;          // the same in float32, if out_codes is null
  // How the work is cut. Sums are exact, so that no result depends on it.
  int64_t rows_per_task, channels_per_task;
  bool by_columns;  // across channels, which not all instruction sets can (IntegerKernels)
  // A channel of the output from each of the input, by itself. Then groups is 1, a row of weights is [kernel height,
  // kernel width], and tasks have all channels.
  bool depthwise;
};

}  // namespace cg
