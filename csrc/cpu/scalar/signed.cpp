#include "compare_key.h"

#include "../generic/hadamard.h"
#include "../generic/norm.h"
#include "../generic/signed.h"
#include "../generic/weights.h"

namespace cg {
const SignedKernels kSignedKernelsDefault = {scalar::signed_alphas, scalar::signed_forward, scalar::signed_dequantize,
                                             scalar::hadamard,      scalar::norm,           scalar::weight_scales};
}
