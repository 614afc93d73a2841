#include "signed_table.h"

#include "../generic/hadamard.h"
#include "../generic/norm.h"
#include "../generic/signed.h"
#include "../generic/weights.h"

namespace cg {
const SignedKernels kSignedKernelsAvx2 = {avx2::signed_alphas, avx2::signed_forward, avx2::signed_dequantize,
                                          avx2::hadamard,      avx2::norm,           avx2::weight_scales};
}
