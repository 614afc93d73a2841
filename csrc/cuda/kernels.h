// What the CUDA kernels are told: plain structs and device pointers, no ATen.
#pragma once

#include "../math/alpha_grad.h"
#include "../math/bits.h"

namespace cg::cuda {

// alpha in the compute type, as it is on the device: a kernel checks what it reads. Element i has channel
// (i / inner) % channels.
struct Steps {
  const void* alpha = nullptr;
  int64_t channels = 1, inner = 1;
};

// Which elements have an alpha in common: all, those of each pack, or none for certain.
enum class Alphas { one, by_pack, by_element };

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
};

struct Backward {
  Dtype dtype;
  Ste ste;
  Rounding rounding;
  AlphaGrad rule;
  int bits;
  int64_t count;
  Steps steps;           // alpha is null where x is
  const void* grad_y;
  const void* x;         // or null: then mask and codes say what is known of it
  const uint8_t* mask;   // null where `kind` is nothing
  MaskKind kind;
  const uint8_t* codes;  // or null
  void* grad_x;          // or null
  double scale;
  void* grad_alpha;      // [channels] in the compute type, or null
  void* partial;         // room for partial_count() sums of the compute type, where grad_alpha is given
};

struct Dequantize {
  Dtype dtype;
  int bits;
  int64_t count;
  Steps steps;
  const uint8_t* codes;
  void* y;
};

struct TimesSlopes {
  Dtype dtype;
  int bits;
  int64_t count;
  const void* grad_y;
  const uint8_t* codes;
  const void* slopes;  // one for each code, in the compute type
  void* grad_x;
};

}  // namespace cg::cuda
