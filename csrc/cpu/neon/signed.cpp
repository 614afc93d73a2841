#include "compare_key.h"

#include "../generic/hadamard.h"
#include "../generic/norm.h"
#include "../generic/signed.h"
#include "../generic/weights.h"

namespace cg {
const SignedKernels kSignedKernelsNeon = {neon::signed_alphas, neon::signed_forward, neon::signed_dequantize,
                                          neon::hadamard,      neon::norm,           neon::weight_scales};
}
