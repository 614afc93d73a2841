// The signed staircase and Hadamard's rotation: checks, allocation, how the work is cut, and the kernels of the
// instruction set in use.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "../math/signed.h"
#include "../register.h"
#include "isa.h"
#include "tensors.h"

namespace cg {
namespace {

using at::Tensor;

// Elements whose alphas are found before any of them is quantized, while they are in cache. Chunks are whole groups and
// whole blocks: if there are none of up to kMaxChunk elements, x is read twice.
constexpr int64_t kChunk = 4096, kMaxChunk = int64_t{1} << 17;

at::ScalarType wide_dtype(Dtype dtype) { return dtype == Dtype::float64 ? at::kDouble : at::kFloat; }

const SignedKernels& signed_kernels(bool regular = true) {
  return (regular ? active_kernels<Kernels>() : kKernelsDefault).signed_kernels;
}

// The alphas of a number of groups, and kBlock entries more, as the kernels take them.
struct DynamicAlphas {
  Tensor both;
  int64_t group;

  DynamicAlphas(const SignedForward& a, int64_t groups)
      : both(at::detail::empty_cpu({2, groups + kBlock}, wide_dtype(a.dtype))), group(a.group) {}

  void* values(int64_t at = 0) const { return static_cast<char*>(both.data_ptr()) + at * both.element_size(); }
  void* inverses(int64_t at = 0) const { return values(both.size(1) + at); }
  Alphas alphas(int64_t count, bool regular) const { return {values(), count, group, inverses(), regular}; }
  // Finds those of groups [begin, end) of a. Returns whether all are regular.
  bool find(const SignedForward& a, int64_t begin, int64_t end) const {
    return signed_kernels().alphas(a, begin, end, values(begin), inverses(begin));
  }
};

// Elements [begin, end) of a, where a group and a block begin.
SignedForward part_of(SignedForward a, int64_t begin, int64_t end, int64_t element_size) {
  a.count = end - begin;
  a.group_alphas += begin / a.group;
  a.x = static_cast<const char*>(a.x) + begin * element_size;
  a.y = static_cast<char*>(a.y) + begin * element_size;
  if (a.mask) a.mask += begin / 8;
  if (a.codes) a.codes += packed_bytes(begin, packed_width(a.bits));
  return a;
}

void forward_in_chunks(const SignedForward& a, int64_t chunk, int64_t element_size) {
  const int64_t chunks = (a.count + chunk - 1) / chunk, grain = std::max<int64_t>(1, kGrainBlocks * kBlock / chunk);
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const DynamicAlphas found(a, chunk / a.group);
    for (int64_t i = begin; i < end; ++i) {
      SignedForward part = part_of(a, i * chunk, std::min((i + 1) * chunk, a.count), element_size);
      const int64_t groups = part.count / a.group;
      part.alphas = found.alphas(groups, found.find(part, 0, groups));
      signed_kernels(part.alphas.regular).forward(part, 0, block_total(part.count));
    }
  });
}

void forward_given(const SignedForward& a) {
  const auto run = signed_kernels(a.alphas.regular).forward;
  at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

void forward_dynamic(SignedForward a, int64_t element_size) {
  const int64_t unit = std::lcm(a.group, int64_t{kBlock}), chunk = std::max(unit, kChunk / unit * unit);
  if (chunk <= kMaxChunk) return forward_in_chunks(a, chunk, element_size);
  const int64_t groups = a.count / a.group;
  const DynamicAlphas found(a, groups);
  std::atomic<bool> regular = true;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    if (!found.find(a, begin, end)) regular = false;
  });
  a.alphas = found.alphas(groups, regular);
  forward_given(a);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qsigned_forward(const Tensor& x, const std::optional<Tensor>& alpha,
                                                           int64_t bits, std::optional<int64_t> group, bool mask,
                                                           bool codes, std::optional<int64_t> channel_dim) {
  SignedForward a{};
  a.dtype = dtype_of(x, "x");
  a.group = check_signed(x, alpha.has_value(), bits, group, channel_dim);
  a.bits = static_cast<int>(bits);
  const auto format = alpha ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
  const Tensor dense = x.contiguous(format);
  a.count = dense.numel();
  a.x = dense.const_data_ptr();
  Tensor y = empty_in(dense, format), found;
  Tensor packed_mask = empty_bytes(packed_bytes(a.count, mask ? 1 : 0));
  Tensor packed_codes = empty_bytes(packed_bytes(a.count, codes ? packed_width(a.bits) : 0));
  a.y = y.mutable_data_ptr();
  a.stream = streams(y);
  if (mask) a.mask = packed_mask.mutable_data_ptr<uint8_t>();
  if (codes) a.codes = packed_codes.mutable_data_ptr<uint8_t>();
  if (alpha) {
    found = at::detail::empty_cpu({0}, at::kBFloat16);
    with_alphas(dense, a.dtype, *alpha, signed_top(a.bits), Rounding::nearest, channel_dim, [&](const Alphas& alphas) {
      a.alphas = alphas;
      forward_given(a);
    });
  } else {
    std::vector<int64_t> shape = dense.sizes().vec();
    shape.back() /= a.group;
    found = at::detail::empty_cpu(shape, at::kBFloat16);
    a.group_alphas = static_cast<bf16*>(found.mutable_data_ptr());
    if (a.count > 0) forward_dynamic(a, dense.element_size());
  }
  return {std::move(y), std::move(found), std::move(packed_mask), std::move(packed_codes)};
}

Tensor qsigned_dequantize(const Tensor& codes, const Tensor& alpha, int64_t bits, std::optional<int64_t> group,
                          at::IntArrayRef shape, at::ScalarType dtype, std::optional<int64_t> channel_dim,
                          at::MemoryFormat memory_format) {
  check_signed_bits(bits);
  Tensor y = at::detail::empty_cpu(shape, dtype, /*pin_memory=*/false, memory_format);
  SignedDequantize a{};
  a.dtype = dtype_of(y, "dtype");
  a.bits = static_cast<int>(bits);
  a.count = y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), y.device());
  a.codes = codes.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  a.stream = streams(y);
  const auto run = [&](const Alphas& alphas) {
    a.alphas = alphas;
    const auto kernel = signed_kernels().dequantize;
    at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  if (!group) {
    with_alphas(y, a.dtype, alpha, signed_top(a.bits), Rounding::nearest, channel_dim, run);
  } else {
    check_group_alphas(alpha, y, *group);
    const Tensor wide = at::detail::empty_cpu({alpha.numel() + kBlock}, wide_dtype(a.dtype));
    wide.narrow(0, 0, alpha.numel()).copy_(alpha.flatten());
    run({wide.const_data_ptr(), alpha.numel(), *group, wide.const_data_ptr()});
  }
  return y;
}

Tensor hadamard(const Tensor& x, int64_t size) {
  Hadamard a{};
  a.dtype = dtype_of(x, "x");
  check_hadamard(x, size);
  const Tensor dense = x.contiguous();
  Tensor y = empty_in(dense, at::MemoryFormat::Contiguous);
  a.count = dense.numel();
  a.size = size;
  a.scale = std::sqrt(1 / static_cast<double>(size));
  a.x = dense.const_data_ptr();
  a.y = y.mutable_data_ptr();
  const int64_t tile = hadamard_tile(size), tiles = (a.count + tile - 1) / tile;
  const auto run = signed_kernels().hadamard;
  at::parallel_for(0, tiles, std::max<int64_t>(1, kGrainBlocks * kBlock / tile), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::detail::empty_cpu({tile}, wide_dtype(a.dtype));
    run(a, begin, end, scratch.data_ptr());
  });
  return y;
}

}  // namespace

void register_signed_cpu(torch::Library& library) {
  library.impl("qsigned_forward", qsigned_forward);
  library.impl("qsigned_dequantize", qsigned_dequantize);
  library.impl("hadamard", hadamard);
}

}  // namespace cg
