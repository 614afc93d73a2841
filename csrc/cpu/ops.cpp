// The ops on CPU tensors: checks, allocation, and the kernels of the instruction set in use.
#include <ATen/Parallel.h>

#include <optional>
#include <string>
#include <vector>

#include "../register.h"
#include "isa.h"
#include "tensors.h"

namespace cg {
namespace {

using at::Tensor;

// Sums are made per chunk, then over chunks: at least this many blocks each, and at most kMaxChunks of them.
constexpr int64_t kChunkBlocks = 256, kMaxChunks = 64;

int top_code(int bits) { return (1 << bits) - 1; }

const Kernels& kernels_for(const Alphas& alphas) {
  return alphas.regular ? active_kernels<Kernels>() : kKernelsDefault;
}

struct Outputs {
  Tensor mask, codes;
};

// Runs the forward from dense x into y (null: codes alone), allocating what is saved.
Outputs run_forward(const Tensor& x, void* y, bool stream, const Tensor& alpha, int64_t bits, int64_t rounding,
                    int64_t mask, bool codes, std::optional<int64_t> channel_dim) {
  Forward a{};
  a.dtype = dtype_of(x, "x");
  a.rounding = parse("rounding", rounding, kRoundings);
  a.kind = parse("mask", mask, kMaskKinds);
  check_bits(bits);
  a.bits = static_cast<int>(bits);
  a.count = x.numel();
  a.x = x.const_data_ptr();
  a.y = y;
  a.stream = stream;
  Outputs out;
  with_alphas(x, a.dtype, alpha, top_code(a.bits), a.rounding, channel_dim, [&](const Alphas& alphas) {
    a.alphas = alphas;
    out.mask = empty_bytes(packed_bytes(a.count, mask_width(a.kind)));
    out.codes = empty_bytes(codes ? packed_bytes(a.count, packed_width(a.bits)) : 0);
    if (a.kind != MaskKind::nothing) a.mask = out.mask.mutable_data_ptr<uint8_t>();
    if (codes) a.codes = out.codes.mutable_data_ptr<uint8_t>();
    const auto run = kernels_for(alphas).forward;
    at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qrelu_forward(const Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding,
                                                 int64_t mask, bool codes, std::optional<int64_t> channel_dim) {
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  Tensor y = empty_as(dense);
  Outputs out = run_forward(dense, y.mutable_data_ptr(), streams(y), alpha, bits, rounding, mask, codes, channel_dim);
  return {std::move(y), std::move(out.mask), std::move(out.codes)};
}

std::tuple<Tensor, Tensor> qrelu_forward_(Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding, int64_t mask,
                                          bool codes, std::optional<int64_t> channel_dim) {
  // What is already in cache is written back to it: no streaming in place.
  Tensor dense = x.contiguous(x.suggest_memory_format());
  Outputs out = run_forward(dense, dense.mutable_data_ptr(), false, alpha, bits, rounding, mask, codes, channel_dim);
  if (!dense.is_same(x)) x.copy_(dense);
  return {std::move(out.mask), std::move(out.codes)};
}

Tensor qrelu_codes(const Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding,
                   std::optional<int64_t> channel_dim) {
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  return run_forward(dense, nullptr, false, alpha, bits, rounding, int64_t(MaskKind::nothing), true, channel_dim).codes;
}

Tensor integer_quantize(const Tensor& x, const Tensor& alpha, int64_t bits, int64_t rounding,
                        std::optional<int64_t> channel_dim) {
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  const Tensor packed = qrelu_codes(dense, alpha, bits, rounding, channel_dim);
  Tensor codes = at::detail::empty_cpu(dense.sizes(), at::kByte, /*pin_memory=*/false, dense.suggest_memory_format());
  const UnpackCodes a{static_cast<int>(bits), dense.numel(), packed.const_data_ptr<uint8_t>(),
                      codes.mutable_data_ptr<uint8_t>()};
  const auto run = active_kernels<Kernels>().unpack_codes;
  at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return codes;
}

std::tuple<Tensor, Tensor> qrelu_backward(const Tensor& grad_y, const std::optional<Tensor>& alpha,
                                          const std::optional<Tensor>& x, const std::optional<Tensor>& mask,
                                          const std::optional<Tensor>& codes, int64_t bits, int64_t ste,
                                          int64_t rounding, int64_t alpha_grad, double alpha_scale,
                                          std::optional<int64_t> channel_dim, bool need_grad_x, bool need_grad_alpha) {
  check_bits(bits);
  Backward a{};
  a.dtype = dtype_of(grad_y, "grad_y");
  a.ste = parse("ste", ste, kStes);
  a.rounding = parse("rounding", rounding, kRoundings);
  a.rule = parse("alpha_grad", alpha_grad, kAlphaGrads);
  a.bits = static_cast<int>(bits);
  a.count = grad_y.numel();
  const Saved saved = cg::saved(a.ste, a.rounding, a.rule, need_grad_x, need_grad_alpha);
  a.kind = saved.mask;
  const Tensor dense = grad_y.contiguous(grad_y.suggest_memory_format());
  a.grad_y = dense.const_data_ptr();
  Tensor x_dense;
  check_saved(saved, grad_y, alpha, x, mask, codes, bits, a.ste, a.rule);
  if (saved.x) {
    x_dense = x->contiguous(dense.suggest_memory_format());
    a.x = x_dense.const_data_ptr();
  }
  if (saved.mask != MaskKind::nothing) a.mask = mask->const_data_ptr<uint8_t>();
  if (saved.codes) a.codes = codes->const_data_ptr<uint8_t>();
  Tensor grad_x = need_grad_x ? empty_as(dense) : at::detail::empty_cpu({0}, grad_y.scalar_type());
  if (need_grad_x) {
    a.grad_x = grad_x.mutable_data_ptr();
    a.stream = streams(grad_x);
  }
  const Channels channels = channels_of(dense, channel_dim);
  const double scale = number_of_scale(alpha_scale, grad_y, bits);
  const int64_t blocks = block_total(a.count);
  a.chunk_blocks = std::max(kChunkBlocks, (blocks + kMaxChunks - 1) / kMaxChunks);
  Tensor grad_alpha;
  const auto run = [&](const Alphas& alphas) {
    a.alphas = alphas;
    const auto kernel = kernels_for(alphas).backward;
    if (!need_grad_alpha) {
      grad_alpha = at::detail::empty_cpu({0}, a.dtype == Dtype::float64 ? at::kDouble : at::kFloat);
      at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      return;
    }
    const int64_t chunks = (blocks + a.chunk_blocks - 1) / a.chunk_blocks;
    const auto sum = [&](auto zero, at::ScalarType compute) {
      using A = decltype(zero);
      std::vector<A> partial(chunks * channels.count, zero);
      a.partial = partial.data();
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        kernel(a, begin * a.chunk_blocks, std::min(end * a.chunk_blocks, blocks));
      });
      grad_alpha = at::detail::empty_cpu({channel_dim ? grad_y.size(*channel_dim) : 1}, compute);
      A* out = grad_alpha.template mutable_data_ptr<A>();
      for (int64_t channel = 0; channel < grad_alpha.numel(); ++channel) {
        A total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * channels.count + channel];
        out[channel] = static_cast<A>(total * scale);
      }
    };
    if (a.dtype == Dtype::float64) sum(double{}, at::kDouble);
    else sum(float{}, at::kFloat);
  };
  if (saved.x) {
    with_alphas(dense, a.dtype, *alpha, top_code(a.bits), a.rounding, channel_dim, run);
  } else {
    run(Alphas{nullptr, channels.count, channels.inner});
  }
  return {std::move(grad_x), std::move(grad_alpha)};
}

Tensor dequantize(const Tensor& codes, const Tensor& alpha, int64_t bits, at::IntArrayRef shape, at::ScalarType dtype,
                  std::optional<int64_t> channel_dim, at::MemoryFormat memory_format) {
  check_bits(bits);
  Tensor y = at::detail::empty_cpu(shape, dtype, /*pin_memory=*/false, memory_format);
  Dequantize a{};
  a.dtype = dtype_of(y, "dtype");
  a.bits = static_cast<int>(bits);
  a.count = y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), y.device());
  a.codes = codes.const_data_ptr<uint8_t>();
  a.y = y.mutable_data_ptr();
  a.stream = streams(y);
  with_alphas(y, a.dtype, alpha, top_code(a.bits), Rounding::ceil, channel_dim, [&](const Alphas& alphas) {
    a.alphas = alphas;
    const auto run = active_kernels<Kernels>().dequantize;
    at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  });
  return y;
}

Tensor backward_from_slopes(const Tensor& grad_y, const Tensor& codes, const Tensor& slopes, int64_t bits) {
  check_bits(bits);
  BackwardFromSlopes a{};
  a.dtype = dtype_of(grad_y, "grad_y");
  a.bits = static_cast<int>(bits);
  a.count = grad_y.numel();
  check_packed(codes, "codes", a.count, packed_width(a.bits), grad_y.device());
  check_slopes(slopes, grad_y, bits);
  const Tensor dense = grad_y.contiguous(grad_y.suggest_memory_format());
  Tensor grad_x = empty_as(dense);
  a.grad_y = dense.const_data_ptr();
  a.codes = codes.const_data_ptr<uint8_t>();
  a.slopes = slopes.const_data_ptr();
  a.grad_x = grad_x.mutable_data_ptr();
  a.stream = streams(grad_x);
  const auto run = active_kernels<Kernels>().backward_from_slopes;
  at::parallel_for(0, block_total(a.count), kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return grad_x;
}

}  // namespace

void copy_cpu(const Tensor& to, const Tensor& from) {
  for (const auto& [tensor, name] : {std::pair{&to, "to"}, std::pair{&from, "from"}}) {
    TORCH_CHECK_VALUE(tensor->device().is_cpu() && tensor->is_contiguous(), name, " must be contiguous on a CPU, got ",
                      tensor->toString(), " with strides ", tensor->strides());
  }
  TORCH_CHECK_VALUE(to.nbytes() == from.nbytes(), "to must have from's ", from.nbytes(), " bytes, got ", to.nbytes());
  const Copy a{static_cast<const float*>(from.const_data_ptr()), static_cast<float*>(to.mutable_data_ptr()),
               streams(to)};
  constexpr int64_t kBytes = kBlock * sizeof(float);
  const int64_t bytes = from.nbytes(), whole = bytes / kBytes;
  const auto run = active_kernels<Kernels>().copy;
  // As many bytes a thread as the others take in float32.
  at::parallel_for(0, whole, kGrainBlocks, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  memcpy(a.to + whole * kBlock, a.from + whole * kBlock, bytes - whole * kBytes);
}

void register_cpu(torch::Library& library) {
  library.impl("qrelu_forward", qrelu_forward);
  library.impl("qrelu_forward_", qrelu_forward_);
  library.impl("qrelu_backward", qrelu_backward);
  library.impl("qrelu_codes", qrelu_codes);
  library.impl("dequantize", dequantize);
  library.impl("backward_from_slopes", backward_from_slopes);
  library.impl("integer_quantize", integer_quantize);
}

}  // namespace cg
