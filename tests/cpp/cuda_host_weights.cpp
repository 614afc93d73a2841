// The CUDA kernels of the scale of quantized weights on the CPU.
#include "cuda_host_cases.h"

#include "cuda/weight_dispatch.cuh"

namespace {

void run(const Header& h, const Buffer (&b)[kBuffers]) {
  using namespace cg;
  using namespace cg::cuda;
  const WeightScale a{.dtype = static_cast<Dtype>(h.dtype),
                      .bits = static_cast<int>(h.bits),
                      .rows = h.channels,
                      .length = h.count / std::max<int64_t>(h.channels, 1),
                      .weight = b[kX].data(),
                      .scale = b[kAlpha].data()};
  const int64_t tried = tried_count(a);
  std::vector<Quotient> of_tried(a.rows * tried), found(a.rows);
  std::vector<unsigned long long> largest(a.rows);
  std::vector<int32_t> magnitudes(a.bits == 2 ? h.count : 0, -1);
  std::vector<int64_t> totals(magnitudes.size());
  const auto sort = [&](WeightSums& s) {
    for (int64_t row = 0; row < a.rows; ++row) {
      int32_t* const m = magnitudes.data() + row * a.length;
      std::sort(m, m + a.length, std::greater<>());
      int64_t sum = 0;
      for (int64_t i = 0; i < a.length; ++i) totals[row * a.length + i] = sum += m[i];
    }
    s.totals = totals.data();
  };
  launch_weight_scale(a, WeightSums{largest.data(), of_tried.data(), tried, found.data(), magnitudes.data(), nullptr},
                      sort, cudaStream_t{});
}

}  // namespace

int main() { return run_cases(run); }
