// What the programs that run the CUDA kernels on the CPU share.
#pragma once

#include "cuda_host.h"
#include "host_cases.h"

// Calls run(header, buffers) for each case; returns the exit status.
template <class Run>
int run_cases(const Run& run) {
  return for_each_case([&](const Header& header, const Buffer(&buffers)[kBuffers]) {
    cuda_host::random_order.seed(static_cast<unsigned>(header.seed));
    run(header, buffers);
  });
}
