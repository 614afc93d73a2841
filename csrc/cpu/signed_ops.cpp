// The signed staircase, Hadamard's rotation, and norms before both: checks, allocation, how the work is cut, and the
// kernels of the instruction set in use.
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

// Elements [begin, end) of a, where a group and a block begin, but for x.
SignedForward part_of(SignedForward a, int64_t begin, int64_t end, int64_t element_size) {
  a.count = end - begin;
  a.group_alphas += begin / a.group;
  a.y = static_cast<char*>(a.y) + begin * element_size;
  if (a.mask) a.mask += begin / 8;
  if (a.codes) a.codes += packed_bytes(begin, packed_width(a.bits));
  return a;
}

// x_of_thread()(begin, end): where a thread finds elements [begin, end) of x. source: what these are made of, or x.
template <class XOfThread>
void forward_in_chunks(const SignedForward& a, const void* source, int64_t chunk, int64_t element_size,
                       const XOfThread& x_of_thread) {
  const int64_t chunks = (a.count + chunk - 1) / chunk, grain = std::max<int64_t>(1, kGrainBlocks * kBlock / chunk);
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const DynamicAlphas found(a, chunk / a.group);
    const auto x_of = x_of_thread();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * chunk, last = std::min(first + chunk, a.count);
      SignedForward part = part_of(a, first, last, element_size);
      part.x = x_of(first, last);
      if (last + chunk <= a.count) part.next = static_cast<const char*>(source) + last * element_size;
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

// Whole blocks and whole multiples of `unit`: as many as are up to kChunk elements, or one.
int64_t chunk_of(int64_t unit) {
  unit = std::lcm(unit, int64_t{kBlock});
  return std::max(unit, kChunk / unit * unit);
}

void forward_dynamic(SignedForward a, int64_t element_size) {
  if (const int64_t chunk = chunk_of(a.group); chunk <= kMaxChunk) {
    return forward_in_chunks(a, a.x, chunk, element_size, [&] {
      return [&](int64_t begin, int64_t) { return static_cast<const char*>(a.x) + begin * element_size; };
    });
  }
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
    a.group = *group;
    const Tensor wide = at::detail::empty_cpu({alpha.numel() + kBlock}, wide_dtype(a.dtype));
    wide.narrow(0, 0, alpha.numel()).copy_(alpha.flatten());
    run({wide.const_data_ptr(), alpha.numel(), *group, wide.const_data_ptr()});
  }
  return y;
}

Hadamard hadamard_of(Dtype dtype, int64_t size) {
  Hadamard a{};
  a.dtype = dtype;
  a.size = size;
  a.scale = std::sqrt(1 / static_cast<double>(size));
  return a;
}

// All of x, by several threads.
void rotate(const Hadamard& a) {
  const int64_t tile = hadamard_tile(a.size), tiles = (a.count + tile - 1) / tile;
  const auto run = signed_kernels().hadamard;
  at::parallel_for(0, tiles, std::max<int64_t>(1, kGrainBlocks * kBlock / tile), [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::detail::empty_cpu({tile}, wide_dtype(a.dtype));
    run(a, begin, end, scratch.data_ptr());
  });
}

Tensor hadamard(const Tensor& x, int64_t size) {
  const Dtype dtype = dtype_of(x, "x");
  check_hadamard(x, size);
  Hadamard a = hadamard_of(dtype, size);
  const Tensor dense = x.contiguous();
  Tensor y = empty_in(dense, at::MemoryFormat::Contiguous);
  a.count = dense.numel();
  a.x = dense.const_data_ptr();
  a.y = y.mutable_data_ptr();
  rotate(a);
  return y;
}

// A parameter of a norm in the compute type, as the kernels take it: plus `shift`, or ones if there is none.
Tensor whole_blocks(const std::optional<Tensor>& parameter, int64_t length, at::ScalarType wide, double shift) {
  Tensor padded = at::detail::empty_cpu({block_total(length) * kBlock}, wide);
  if (!parameter) return padded.fill_(1);
  Tensor values = padded.narrow(0, 0, length);
  values.copy_(parameter->detach());
  if (shift != 0) values.add_(shift);
  return padded;
}

// Whether all values are finite, in a loop so simple that compilers vectorise it.
template <class Bits>
bool all_finite(const void* values, int64_t count, Bits infinity) {
  const Bits* const bits = static_cast<const Bits*>(values);
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits[i] & (~Bits(0) >> 1));
  return largest < infinity;
}
bool all_finite(const Tensor& t) {
  if (t.scalar_type() == at::kDouble) return all_finite<uint64_t>(t.const_data_ptr(), t.numel(), 0x7ffull << 52);
  return all_finite<uint32_t>(t.const_data_ptr(), t.numel(), 0x7f800000);
}

// All rows, by several threads.
void norm_rows(const Norm& a) {
  const auto run = signed_kernels().norm;
  const int64_t grain = std::max<int64_t>(1, kGrainBlocks * kBlock / std::max<int64_t>(a.length, 1));
  at::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::detail::empty_cpu({norm_scratch(a.length)}, wide_dtype(a.dtype));
    run(a, begin, end, scratch.mutable_data_ptr());
  });
}

// The rows of n from `first` on; out is given, or n's.
Norm rows_from(Norm n, int64_t first, int64_t element_size, void* out) {
  const int64_t bytes = first * n.length * element_size,
                wide = n.dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  n.x = static_cast<const char*>(n.x) + bytes;
  n.out = out ? out : static_cast<char*>(n.out) + bytes;
  if (n.mean) n.mean = static_cast<char*>(n.mean) + first * wide;
  n.inverse = static_cast<char*>(n.inverse) + first * wide;
  return n;
}

// The norm, rotated by r unless its size is 0, and its staircase, in chunks of whole rows.
void staircase_in_chunks(const Norm& n, const Hadamard& r, const SignedForward& a, int64_t chunk, at::ScalarType type) {
  const int64_t element_size = at::elementSize(type);
  forward_in_chunks(a, n.x, chunk, element_size, [&] {
    const int64_t room = std::max(norm_scratch(n.length), r.size > 0 ? hadamard_tile(r.size) : 0);
    const Tensor scratch = at::detail::empty_cpu({room}, wide_dtype(n.dtype));
    const Tensor made = at::detail::empty_cpu({n.out && r.size == 0 ? 0 : chunk}, type);
    return [&n, &r, element_size, scratch, made](int64_t begin, int64_t end) -> const void* {
      void* const buffer = made.mutable_data_ptr();
      const int64_t first = begin / n.length;
      const Norm rows = rows_from(n, first, element_size, n.out ? nullptr : buffer);
      signed_kernels().norm(rows, 0, end / n.length - first, scratch.mutable_data_ptr());
      if (r.size == 0) return rows.out;
      Hadamard part = r;
      part.count = end - begin;
      part.x = rows.out;
      part.y = buffer;
      const int64_t tile = hadamard_tile(r.size);
      signed_kernels().hadamard(part, 0, (part.count + tile - 1) / tile, scratch.mutable_data_ptr());
      return buffer;
    };
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_qsigned(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool centred,
    bool shifted, bool rounds_twice, std::optional<int64_t> bits, std::optional<int64_t> group,
    std::optional<int64_t> rotation, bool output, bool codes) {
  Norm n{};
  n.dtype = dtype_of(x, "x");
  const int64_t shared = check_norm(x, weight, bias, bits, group, rotation, output);
  const Tensor dense = x.contiguous();
  n.length = x.size(-1);
  n.rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  n.eps = eps;
  n.rounds_twice = rounds_twice;
  n.x = dense.const_data_ptr();
  const auto wide = wide_dtype(n.dtype), type = x.scalar_type();
  const Tensor factors = whole_blocks(weight, n.length, wide, shifted ? 1 : 0);
  n.weight = factors.const_data_ptr();
  n.finite = all_finite(factors.narrow(0, 0, n.length));
  Tensor terms;
  if (bias) {
    terms = whole_blocks(bias, n.length, wide, 0);
    n.bias = terms.const_data_ptr();
    n.finite &= all_finite(terms.narrow(0, 0, n.length));
  }
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = 1;
  const auto none = [](at::ScalarType of) { return at::detail::empty_cpu({0}, of); };
  Tensor mean = centred ? at::detail::empty_cpu(shape, wide) : none(wide), inverse = at::detail::empty_cpu(shape, wide);
  if (centred) n.mean = mean.mutable_data_ptr();
  n.inverse = inverse.mutable_data_ptr();
  Tensor normed = output ? empty_in(dense, at::MemoryFormat::Contiguous) : none(type);
  if (output) n.out = normed.mutable_data_ptr();
  if (!bits) {
    norm_rows(n);
    return {normed, none(type), empty_bytes(0), none(at::kBFloat16), mean, inverse};
  }
  SignedForward a{};
  a.dtype = n.dtype;
  a.group = shared;
  a.bits = static_cast<int>(*bits);
  a.count = x.numel();
  Hadamard r{};
  if (rotation) r = hadamard_of(n.dtype, *rotation);
  Tensor y = empty_in(dense, at::MemoryFormat::Contiguous);
  Tensor packed_codes = empty_bytes(codes ? packed_bytes(a.count, packed_width(a.bits)) : 0);
  shape.back() = n.length / a.group;
  Tensor found = at::detail::empty_cpu(shape, at::kBFloat16);
  a.group_alphas = static_cast<bf16*>(found.mutable_data_ptr());
  a.y = y.mutable_data_ptr();
  a.stream = streams(y);
  if (codes) a.codes = packed_codes.mutable_data_ptr<uint8_t>();
  const int64_t chunk = a.count > 0 ? chunk_of(n.length) : kMaxChunk + 1;
  if (chunk <= kMaxChunk) {
    staircase_in_chunks(n, r, a, chunk, type);
  } else {
    Tensor whole = output ? normed : empty_in(dense, at::MemoryFormat::Contiguous);
    n.out = whole.mutable_data_ptr();
    norm_rows(n);
    if (rotation) whole = hadamard(whole, *rotation);
    a.x = whole.const_data_ptr();
    if (a.count > 0) forward_dynamic(a, dense.element_size());
  }
  return {normed, y, packed_codes, found, mean, inverse};
}

}  // namespace

void register_signed_cpu(torch::Library& library) {
  library.impl("qsigned_forward", qsigned_forward);
  library.impl("qsigned_dequantize", qsigned_dequantize);
  library.impl("hadamard", hadamard);
  library.impl("norm_qsigned", norm_qsigned);
}

}  // namespace cg
