// The CPU kernels of an instruction set by themselves, named by the argument; for machines that have no torch, as
// emulated ones. A second argument: the blocks of a chunk of sums.
#include "host_cases.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "cpu/integer.h"
#include "cpu/kernels.h"
#include "dispatch.h"
#include "math/signed.h"

namespace {

using namespace cg;

int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }

// Alphas with their reciprocals, and kBlock more of them.
template <class A>
struct Prepared {
  std::vector<A> values, inverses;
  Alphas alphas;

  template <class T>
  void fill(const A* given, const Header& h, int top, Rounding rounding) {
    alphas = {nullptr, h.channels, h.inner};
    for (int64_t i = 0; i < h.channels + kBlock; ++i) {
      const A alpha = given[i % h.channels];
      values.push_back(alpha), inverses.push_back(reciprocal(alpha, rounding));
      alphas.regular &= regular<T>(alpha, A(top));
    }
    alphas.values = values.data(), alphas.inverses = inverses.data();
  }
};

// body(alphas) in the compute type; of a backward that reads none, without values.
template <class Body>
void with_alphas(const Header& h, const void* given, int top, Rounding rounding, const Body& body) {
  if (!given) return body(Alphas{nullptr, h.channels, h.inner});
  with_dtype(static_cast<Dtype>(h.dtype), [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    Prepared<compute_t<T>> prepared;
    prepared.template fill<T>(static_cast<const compute_t<T>*>(given), h, top, rounding);
    body(prepared.alphas);
  });
}

// Chunks are short, so that there are some.
int64_t chunk_blocks = 3;

void backward(const Kernels& kernels, Backward a, int64_t blocks) {
  if (!a.grad_alpha) return kernels.backward(a, 0, blocks);
  with_dtype(a.dtype, [&](auto dtype) {
    using A = compute_t<typename decltype(dtype)::type>;
    const int64_t chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
    std::vector<A> partial(chunks * a.alphas.channels);
    a.partial = partial.data(), a.chunk_blocks = chunk_blocks;
    kernels.backward(a, 0, blocks);
    for (int64_t channel = 0; channel < a.alphas.channels; ++channel) {
      A total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * a.alphas.channels + channel];
      static_cast<A*>(a.grad_alpha)[channel] = static_cast<A>(total * a.scale);
    }
  });
}

void signed_forward(const Kernels& kernels, SignedForward a) {
  const auto run = [&] {
    const Kernels& serving = a.alphas.regular ? kernels : kKernelsDefault;
    serving.signed_kernels.forward(a, 0, blocks_of(a.count));
  };
  if (a.group == 0) return run();
  if (a.count == 0) return;
  const int64_t groups = a.count / a.group;
  std::vector<double> values = scratch(a.dtype, groups + kBlock), inverses = values;
  const bool regular = kernels.signed_kernels.alphas(a, 0, groups, values.data(), inverses.data());
  a.alphas = {values.data(), groups, a.group, inverses.data(), regular};
  run();
}

// Alphas of groups in the compute type.
std::vector<double> widened(Dtype dtype, const bf16* from, int64_t count) {
  std::vector<double> to = scratch(dtype, count + kBlock);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == Dtype::float64) to[i] = to_float(from[i]);
    else reinterpret_cast<float*>(to.data())[i] = to_float(from[i]);
  }
  return to;
}

// Weights in the compute type, in whole blocks.
std::vector<double> whole_blocks(Dtype dtype, const void* from, int64_t length) {
  std::vector<double> to = scratch(dtype, blocks_of(length) * kBlock);
  const size_t size = dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
  if (from) std::memcpy(to.data(), from, length * size);
  return to;
}

// A layer on codes by weights of `group` bits, in tasks of as many rows as csrc/cpu/integer_ops.cpp gives them, and of
// all channels. A Linear has `channels` outputs of rows of `inner` codes. Convolutions have windows of 3 x 3, with
// padding, of an image with `inner` pixels in a line and as many channels as there are outputs; depthwise, each by
// itself.
void layer_on_codes(const IntegerKernels& kernels, const Header& h, const Buffer (&b)[kBuffers]) {
  const bool linear = h.op == kLinear;
  IntegerLayer a{};
  for (int i = 0; i < 2; ++i) {
    a.stride[i] = a.dilation[i] = 1, a.size[i] = 1, a.kernel[i] = linear ? 1 : 3, a.padding[i] = linear ? 0 : 1;
  }
  a.codes = b[kX].packed(), a.bits = static_cast<int>(h.bits), a.out_channels = h.channels;
  a.groups = 1;
  if (linear) {
    a.images = h.count / h.inner, a.channels = h.inner;
  } else {
    a.images = 1, a.channels = h.channels;
    a.size[0] = h.count / (h.channels * h.inner), a.size[1] = h.inner;
  }
  const int64_t rows = a.images * a.size[0] * a.size[1];
  a.depthwise = h.op == kDepthwise, a.by_columns = !a.depthwise && kernels.by_columns && rows >= 48;
  a.rows_per_task = a.depthwise ? h.inner : std::min<int64_t>(rows, a.by_columns ? 64 : 32);
  a.channels_per_task = h.channels;
  a.out_size[0] = a.size[0], a.out_size[1] = a.size[1];
  const int64_t row_codes = a.kernel[0] * a.kernel[1] * (a.depthwise ? 1 : a.channels);
  a.weight = b[kWeight].packed(), a.weight_bits = static_cast<int>(h.group);
  a.row_bytes = IntegerShape::parts(row_codes * h.group, 8 * kWeightBlock) * kWeightBlock;
  a.scale = static_cast<const float*>(b[kAlpha].data()), a.offset = static_cast<const float*>(b[kBias].data());
  a.out = static_cast<float*>(b[kOut].data());
  const IntegerShape shape(a);
  uint8_t* const room = static_cast<uint8_t*>(std::aligned_alloc(64, IntegerShape::rounded(shape.scratch(a), 64)));
  kernels.layer(a, 0, shape.tasks(a), room);
  std::free(room);
}

void run(const Kernels& kernels, const Header& h, const Buffer (&b)[kBuffers]) {
  const auto dtype = static_cast<Dtype>(h.dtype);
  const auto rounding = static_cast<Rounding>(h.rounding);
  const int bits = static_cast<int>(h.bits), top = (1 << bits) - 1;
  const int64_t blocks = blocks_of(h.count);
  bf16* const group_alphas = static_cast<bf16*>(b[kGroupAlphas].data());
  const void* const alpha = b[kAlpha].data();
  const auto serving = [&](const Alphas& alphas) -> const Kernels& {
    return alphas.regular ? kernels : kKernelsDefault;
  };
  if (h.op == kForward) {
    with_alphas(h, alpha, top, rounding,
                [&](const Alphas& alphas) { serving(alphas).forward(forward_of(h, b, alphas), 0, blocks); });
  } else if (h.op == kDequantize) {
    with_alphas(h, alpha, top, rounding,
                [&](const Alphas& alphas) { kernels.dequantize(dequantize_of(h, b, alphas), 0, blocks); });
  } else if (h.op == kBackwardFromSlopes) {
    kernels.backward_from_slopes(backward_from_slopes_of(h, b), 0, blocks);
  } else if (h.op == kBackward) {
    with_alphas(h, alpha, top, rounding,
                [&](const Alphas& alphas) { backward(serving(alphas), backward_of(h, b, alphas), blocks); });
  } else if (h.op == kSignedForward) {
    with_alphas(h, alpha, signed_top(bits), Rounding::nearest, [&](const Alphas& alphas) {
      signed_forward(kernels, {dtype, bits, h.count, alphas, h.group, group_alphas, b[kX].data(), b[kY].data(),
                               b[kMask].packed(), b[kCodes].packed(), false});
    });
  } else if (h.op == kSignedDequantize) {
    const auto run = [&](const Alphas& alphas) {
      kernels.signed_kernels.dequantize(
          {dtype, bits, h.count, alphas, h.group, group_alphas, b[kCodes].packed(), b[kY].data(), false}, 0, blocks);
    };
    if (h.group == 0) return with_alphas(h, alpha, signed_top(bits), Rounding::nearest, run);
    const std::vector<double> wide = widened(dtype, group_alphas, h.count / h.group);
    run({wide.data(), h.count / h.group, h.group, wide.data()});
  } else if (h.op == kHadamard) {
    const int64_t tile = hadamard_tile(h.group);
    kernels.signed_kernels.hadamard({dtype, h.count, h.group, h.scale, b[kX].data(), b[kY].data()}, 0,
                                    (h.count + tile - 1) / tile, scratch(dtype, tile).data());
  } else if (h.op == kWeightScale) {
    const int64_t rows = h.channels, length = h.count / std::max<int64_t>(rows, 1);
    std::vector<int32_t> magnitudes(blocks_of(length) * kBlock), more(magnitudes.size());
    kernels.signed_kernels.weight_scales({dtype, bits, rows, length, b[kX].data(), b[kAlpha].data()}, 0, rows,
                                         magnitudes.data(), more.data());
  } else if (h.op == kCopy) {  // of whole blocks of float32
    kernels.copy({static_cast<const float*>(b[kX].data()), static_cast<float*>(b[kY].data()), false}, 0, blocks);
  } else {  // a norm of `channels` rows of `inner` elements; scale is eps
    const std::vector<double> weight = whole_blocks(dtype, b[kWeight].data(), h.inner);
    const std::vector<double> bias = whole_blocks(dtype, b[kBias].data(), h.inner);
    kernels.signed_kernels.norm({.dtype = dtype,
                                 .rows = h.channels,
                                 .length = h.inner,
                                 .eps = h.scale,
                                 .rounds_twice = (h.flags & 2) != 0,
                                 .x = b[kX].data(),
                                 .weight = weight.data(),
                                 .bias = b[kBias].data() ? bias.data() : nullptr,
                                 .out = b[kOut].data(),
                                 .mean = b[kMean].data(),
                                 .inverse = b[kInverse].data()},
                                0, h.channels, scratch(dtype, norm_scratch(h.inner)).data());
  }
}

const Kernels* const kSets[] = {
#if defined(CG_HAVE_AVX2)
    &kKernelsAvx2,
#endif
#if defined(CG_HAVE_AVX512)
    &kKernelsAvx512,
#endif
#if defined(CG_HAVE_NEON)
    &kKernelsNeon,
#endif
    &kKernelsDefault};
const IntegerKernels* const kIntegerSets[] = {
#if defined(CG_HAVE_AVX2)
    &kIntegerKernelsAvx2,
#endif
#if defined(CG_HAVE_AVXVNNI)
    &kIntegerKernelsAvxVnni,
#endif
#if defined(CG_HAVE_AVX512)
    &kIntegerKernelsAvx512,
#endif
#if defined(CG_HAVE_AVX512VNNI)
    &kIntegerKernelsAvx512Vnni,
#endif
#if defined(CG_HAVE_AMX)
    &kIntegerKernelsAmx,
#endif
#if defined(CG_HAVE_NEON)
    &kIntegerKernelsNeon,
#endif
#if defined(CG_HAVE_NEONDOT)
    &kIntegerKernelsNeonDot,
#endif
#if defined(CG_HAVE_NEONI8MM)
    &kIntegerKernelsNeonI8mm,
#endif
    &kIntegerKernelsDefault};

template <class K, size_t kCount>
const K* named(const K* const (&sets)[kCount], const std::string& isa) {
  const auto found = std::find_if(sets, sets + kCount, [&](const K* set) { return isa == set->isa; });
  return found == sets + kCount ? nullptr : *found;
}
template <class K>
const K& needed(const K* kernels) {
  if (!kernels) throw std::runtime_error("this instruction set has no kernel of the op");
  return *kernels;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string isa = argc == 2 || argc == 3 ? argv[1] : "";
  const Kernels* const kernels = named(kSets, isa);
  const IntegerKernels* const integer_kernels = named(kIntegerSets, isa);
  if (argc == 3) chunk_blocks = std::atoll(argv[2]);
  if ((!kernels && !integer_kernels) || chunk_blocks < 1) {
    std::fprintf(stderr, "wanted the name of an instruction set that this program has, and blocks if any\n");
    return 1;
  }
  return for_each_case([&](const Header& h, const Buffer(&b)[kBuffers]) {
    if (h.op == kLinear || h.op == kConv || h.op == kDepthwise) layer_on_codes(needed(integer_kernels), h, b);
    else run(needed(kernels), h, b);
  });
}
