#include "compare_key.h"

#include "../generic/hadamard.h"
#include "../generic/norm.h"
#include "../generic/signed.h"
#include "../generic/weights.h"

namespace cg {
const SignedKernels kSignedKernelsAvx512 = {avx512::signed_alphas, avx512::signed_forward, avx512::signed_dequantize,
                                            avx512::hadamard,      avx512::norm,           avx512::weight_scales};
}
