#include "compare_key.h"

#include "../generic/hadamard.h"
#include "../generic/signed.h"

namespace cg {
const SignedKernels kSignedKernelsDefault = {scalar::signed_alphas, scalar::signed_forward, scalar::signed_dequantize,
                                             scalar::hadamard};
}
