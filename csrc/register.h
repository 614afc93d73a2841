// Each adds the kernels of one dispatch key to the ops that python/coarsegrad/_ops.py defines.
#pragma once

#include <torch/library.h>

namespace cg {

void register_cpu(torch::Library& library);
void register_cuda(torch::Library& library);  // csrc/cuda, where it is built
void register_autograd(torch::Library& library);

// No op: what benchmarks measure the CPU kernels by. Copies bytes, in blocks and threads as they do.
void copy_cpu(const at::Tensor& to, const at::Tensor& from);

}  // namespace cg
