"""The ops as torch sees them: opcheck, torch.compile, torch.export, autocast."""

from __future__ import annotations

import functools
import itertools

import oracle
import pytest
import torch
from saved_for import saved_for
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import coarsegrad as cg
from coarsegrad import _mlp
from coarsegrad._types import WEIGHT_BITS, AlphaGrad, MaskKind, Rounding, Ste

ALPHA = torch.tensor([0.4])
CHANNEL_ALPHA = torch.tensor([0.3, 0.4, 0.5])
FORMATS = (torch.contiguous_format, torch.channels_last)


def sample(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward_samples(tail):
    yield (sample(37, dtype=torch.bfloat16), ALPHA, 2, *tail(None))
    yield (sample(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), CHANNEL_ALPHA, 5, *tail(-3))
    yield (sample(2, 3, 4, 5).transpose(1, 3), ALPHA, 1, *tail(None))
    yield (sample(0, 3), ALPHA, 8, *tail(None))
    yield (sample(1)[0], ALPHA, 4, *tail(None))


def qrelu_samples(inplace=False):
    for ste in oracle.STES:
        for alpha_grad, need_x, need_alpha in (
            ("exact", False, False),
            ("exact", True, False),
            ("chain", False, True),
            ("exact", True, True),
            ("two_valued", True, True),
        ):
            if inplace and (need_x or need_alpha):
                continue  # a leaf cannot be written to; the compile tests below differentiate in place
            x = sample(2, 3, 5).requires_grad_(need_x)
            alpha = CHANNEL_ALPHA.clone().requires_grad_(need_alpha)
            yield (x, alpha, 2, ste, "ceil", alpha_grad, 1.0, 1)
    for arguments in forward_samples(lambda channel_dim: ("relu", "hwgq", "exact", 0.5, channel_dim)):
        if not inplace:
            arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])
        yield arguments


def saving_samples():
    for kind, codes in zip(MaskKind, (False, False, True, False, False), strict=True):
        for *arguments, channel_dim in forward_samples(lambda channel_dim: (channel_dim,)):
            yield (*arguments, int(Rounding.nearest), int(kind), codes, channel_dim)


def backward_samples(ste_of=lambda name: int(Ste[name])):
    """With what a forward saved."""
    cases = (
        ("identity", None),
        ("relu", None),
        ("clipped_relu", None),
        ("log_tailed_relu", None),
        ("identity", "exact"),
        ("relu", "exact"),
        ("clipped_relu", "exact"),
        ("clipped_relu", "three_valued"),
        ("trust", None),
        ("trust", "exact"),
        ("trust", "three_valued"),
        ("relu", "two_valued"),
        ("relu", "chain"),
        ("reverse_exponential", "exact"),
    )
    for ste, alpha_grad in cases:
        mask, codes, keep_x = saved_for(ste, "ceil", alpha_grad)
        for memory_format in FORMATS:
            x = sample(2, 3, 4, 5).contiguous(memory_format=memory_format)
            _, bits, packed = torch.ops.coarsegrad.qrelu_forward(x, CHANNEL_ALPHA, 2, Rounding.ceil, mask, codes, 1)
            with_x = (CHANNEL_ALPHA, x) if keep_x else (None, None)
            saved = (*with_x, None if mask == MaskKind.nothing else bits, packed if codes else None)
            dy = sample(2, 3, 4, 5, seed=1).contiguous(memory_format=memory_format)
            rule = (2, ste_of(ste), int(Rounding.ceil), int(AlphaGrad[alpha_grad or "exact"]), 1.0, 1)
            yield (dy, *saved, *rule, True, alpha_grad is not None)


def slopes_samples(ste):
    """slopes, or the name of their STE."""
    for bits, dtype in ((1, torch.float64), (2, torch.float32), (3, torch.bfloat16), (7, torch.float16)):
        for memory_format in FORMATS:
            dy, x = (sample(2, 3, 4, 5, dtype=dtype, seed=i).contiguous(memory_format=memory_format) for i in (0, 1))
            codes = cg.qrelu_codes(x, ALPHA, bits)
            slopes = sample(2**bits, dtype=oracle.wide(dtype))
            yield (dy, codes, bits, ste) if ste else (dy, codes, slopes, bits)


def dequantize_samples():
    for bits in (1, 2, 4, 7):
        for memory_format in FORMATS:
            x = sample(2, 3, 4, 5).contiguous(memory_format=memory_format)
            codes = cg.qrelu_codes(x, CHANNEL_ALPHA, bits, channel_dim=1)
            dtype = oracle.DTYPES[bits % 4]
            yield (codes, CHANNEL_ALPHA, bits, [2, 3, 4, 5], dtype, 1, memory_format)


def layer_backward_samples(*settings):
    """A Linear over the last dimension, or a Conv2d where there are settings, with and without the codes."""
    for memory_format in FORMATS:
        x = sample(2, 4, 6, 5).contiguous(memory_format=memory_format)
        weight = sample(8, 2, 3, 3) if settings else sample(8, 5)
        out = nn.functional.conv2d(x, weight, None, *settings) if settings else nn.functional.linear(x, weight)
        codes = cg.qrelu_codes(x, ALPHA, 2)
        for mask in ([True, True, True], [False, True, False], [True, False, True]):
            y = (2, [2, 4, 6, 5], x.dtype, None, memory_format)
            yield (torch.randn_like(out), weight, codes if mask[1] else None, ALPHA, *y, mask, *settings)


def layer_samples(*settings):
    shapes = ((2, 4, 6, 5), (8, 2, 3, 3)) if settings else ((2, 3, 5), (8, 5))
    for need, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        x, weight = (sample(*shape, dtype=dtype).requires_grad_(need) for shape in shapes)
        if settings and dtype == torch.bfloat16:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        bias = sample(8, dtype=dtype).requires_grad_() if need else None
        alpha = ALPHA.clone().requires_grad_(need)
        yield (x, alpha, weight, bias, 2, "relu", "ceil", "exact", 0.5, None, dtype, *settings)


def mlp_samples():
    for need, (ste, rounding), dtype in (
        (False, ("relu", "ceil"), torch.float32), (True, ("relu", "hwgq"), torch.float32),
        (True, ("clipped_relu", "nearest"), torch.bfloat16), (True, ("identity", "ceil"), torch.float64),
    ):  # fmt: skip
        sizes = ((2, 3, 5), (8, 5), (8,), (7, 8), (7,))
        x, weight1, bias1, weight2, bias2 = (sample(*size, dtype=dtype).requires_grad_(need) for size in sizes)
        bias1, bias2 = (bias1, None) if need else (None, bias2)
        squared = dtype != torch.float32
        given = x, weight1, bias1, ALPHA, weight2, bias2, 3, ste, rounding
        yield *given, squared
        yield *given, False, weight1.detach(), None, 2 * ALPHA


def mlp_part_samples(op):
    """linear_to_codes, and what reads its codes."""
    for dtype, (ste, mask), bits in ((torch.float32, ("clipped_relu", 2), 2), (torch.bfloat16, ("relu", 0), 3)):
        x, weight1, weight2, grad_out = (sample(*size, dtype=dtype) for size in ((4, 5), (8, 5), (7, 8), (4, 7)))
        bias = sample(8, dtype=dtype) if mask else None
        given = (x, weight1, bias, ALPHA, bits, 0, mask)
        codes, packed_mask, nan_rows = torch.ops.coarsegrad.linear_to_codes(*given)
        for count in (1, 2):  # the square of one staircase, or the product of two
            read, squared = ([codes] * count, [ALPHA, 2 * ALPHA][:count]), bool(mask) and count == 1
            gates = [packed_mask] * count if mask else [], *read
            yield {
                "linear_to_codes": given,
                "linear_from_codes": (read[0], nan_rows, read[1], bits, squared, weight2, None),
                "linear_from_codes_grad_input": (grad_out, weight2, *gates, bits, squared, int(Ste[ste]), 0),
                "linear_from_codes_grad_weight": (grad_out, *read, bits, squared, 8),
            }[op]


def signed_inputs():
    """(x, alpha, bits, group, channel_dim)"""
    yield sample(3, 64, dtype=torch.bfloat16), None, 4, 32, None
    yield sample(2, 3, 6).transpose(1, 2), None, 8, None, None
    yield sample(0, 8), None, 3, 4, None
    yield sample(37), ALPHA, 2, None, None
    yield sample(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), CHANNEL_ALPHA, 5, None, 1


def signed_samples():
    for i, (x, alpha, bits, group, channel_dim) in enumerate(signed_inputs()):
        for rule in ("exact", "chain") if alpha is not None else ("exact",):
            given = None if alpha is None else alpha.clone().requires_grad_()
            yield x.clone().requires_grad_(), given, bits, group, "clipped", rule, 0.5, channel_dim
        if i < 2:
            yield x, alpha, bits, group, "identity", "exact", 1.0, channel_dim


def signed_forward_samples():
    for x, alpha, bits, group, channel_dim in signed_inputs():
        yield x, alpha, bits, group, alpha is not None, True, channel_dim


def signed_backward_samples():
    for x, alpha, bits, group, channel_dim in signed_inputs():
        if alpha is not None:
            _, _, mask, codes = torch.ops.coarsegrad.qsigned_forward(x, alpha, bits, group, True, True, channel_dim)
            dy = torch.randn_like(x)
            rest = (bits, True, int(AlphaGrad.exact), 0.5, channel_dim, True, True)
            yield dy, None, None, mask, codes, *rest
            yield dy, alpha, x, None, None, bits, False, int(AlphaGrad.chain), 1.0, channel_dim, False, True


def signed_dequantize_samples():
    for x, alpha, bits, group, channel_dim in signed_inputs():
        _, dynamic, _, codes = torch.ops.coarsegrad.qsigned_forward(x, alpha, bits, group, False, True, channel_dim)
        memory_format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        if alpha is None:
            alpha, group = dynamic, group or x.size(-1)
        yield codes, alpha, bits, group, list(x.shape), x.dtype, channel_dim, memory_format


def gated_samples(with_gradient=False):
    for activation, dtype in (("silu", torch.float32), ("gelu_tanh", torch.bfloat16), ("identity", torch.float64)):
        tensors = [sample(3, 8, dtype=dtype, seed=seed) for seed in range(3 if with_gradient else 2)]
        yield (*tensors, activation)
        yield (*(t.clone().requires_grad_() for t in tensors), activation)


def hadamard_samples():
    yield sample(3, 64, dtype=torch.bfloat16), 32
    yield sample(8, 6).t().requires_grad_(), 4
    yield sample(0, 8), 8


def norm_samples():
    """x has no gradient here: norms.py has it in autograd functions."""
    for dtype, centred, staircase in (
        (torch.float32, True, (4, 16, 16)), (torch.bfloat16, False, (8, None, None)), (torch.float64, True, (None,) * 3)
    ):  # fmt: skip
        weight, bias = sample(48, dtype=dtype, seed=1), sample(48, seed=2) if centred else None
        for x in (
            sample(3, 48, dtype=dtype),
            sample(2, 48, 5, dtype=dtype).transpose(1, 2),
            sample(0, 48, dtype=dtype),
        ):
            flags = (x.dim() == 3 or staircase[0] is None, x.dim() == 2 and staircase[0] is not None)
            yield x, weight, bias, 1e-5, centred, x.dim() == 3, dtype == torch.bfloat16, *staircase, *flags


def weight_samples():
    for bits, channel_dim in itertools.product(WEIGHT_BITS, (0, -1, None)):
        for weight in (
            sample(4, 5).requires_grad_(), sample(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            sample(3, 4, dtype=torch.bfloat16).t(), sample(0, 3),
        ):  # fmt: skip
            yield weight, bits, channel_dim


def qweight_samples():
    yield from weight_samples()
    for ste, samples in itertools.product(("clipped", "trust"), list(weight_samples())[::5]):
        yield *samples, ste


SAMPLES = {
    "qrelu": qrelu_samples,
    "qrelu_": lambda: qrelu_samples(inplace=True),
    "qrelu_custom": lambda: list(qrelu_samples())[::4],  # a built-in STE does as well
    "qrelu_custom_": lambda: list(qrelu_samples(inplace=True))[::4],
    "qrelu_packed": lambda: list(qrelu_samples())[::4],
    "qrelu_packed_": lambda: list(qrelu_samples(inplace=True))[::4],
    "qrelu_forward_packed": lambda: list(saving_samples())[::4],
    "qrelu_linear": layer_samples,
    "qrelu_conv2d": lambda: layer_samples([2, 1], [1, 1], [1, 2], 2),
    "qrelu_forward": saving_samples,
    "qrelu_forward_": saving_samples,
    "qrelu_backward": backward_samples,
    "qrelu_backward_custom": lambda: backward_samples(str),
    "backward_from_slopes": lambda: slopes_samples(None),
    "qrelu_backward_from_codes": lambda: slopes_samples("reverse_exponential_step"),
    "qrelu_codes": lambda: forward_samples(lambda channel_dim: (int(Rounding.ceil), channel_dim)),
    "dequantize": dequantize_samples,
    "qsigned": signed_samples,
    "qsigned_packed": lambda: list(signed_samples())[::3],
    "qsigned_forward": signed_forward_samples,
    "qsigned_forward_packed": lambda: list(signed_forward_samples())[::2],
    "qsigned_backward": signed_backward_samples,
    "qsigned_dequantize": signed_dequantize_samples,
    "hadamard": hadamard_samples,
    "norm_qsigned": norm_samples,
    "norm_qsigned_packed": lambda: list(norm_samples())[::2],
    "qweight": lambda: list(qweight_samples())[::5],
    "qweight_forward": lambda: [(weight.detach(), *rest, "trust") for weight, *rest in weight_samples()][::5],
    "weight_scale": lambda: list(weight_samples())[::5],
    "weight_codes": lambda: list(weight_samples())[::5],
    "gated_product": gated_samples,
    "gated_product_backward": lambda: gated_samples(with_gradient=True),
    "qrelu_mlp": mlp_samples,
    **{op: functools.partial(mlp_part_samples, op) for op in _mlp.KERNELS},
    "linear_backward_from_codes": layer_backward_samples,
    "conv2d_backward_from_codes": lambda: layer_backward_samples([2, 1], [1, 1], [1, 2], 2),
}


def test_every_op_has_samples():
    defined = {
        s.name.removeprefix("coarsegrad::")
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("coarsegrad::")
    }
    integer = {name for name in defined if name.startswith("integer_")}  # tests/integer
    assert defined - integer == set(SAMPLES)


@pytest.mark.filterwarnings("ignore:packed_activations has no effect in a graph")  # where opcheck runs eager code
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(reference_or_native, name):
    """In Triton's slow interpreter without the checks of what is registered, which is the same whatever serves."""
    op = getattr(torch.ops.coarsegrad, name).default
    checks = {"test_utils": ("test_schema", "test_faketensor")} if reference_or_native == "triton" else {}
    for arguments in SAMPLES[name]():
        torch.library.opcheck(op, arguments, **checks)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager_and_compiled(function, make_inputs, sizes, compiler):
    """Forward and backward of both at several sizes, one graph without breaks."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for size in sizes:
        results = []
        for run in (function, compiled):
            inputs = make_inputs(size)
            y = run(*inputs)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype))
            results.append((y.detach(), *(t.grad for t in inputs if t.requires_grad)))
        assert results[0][0].stride() == results[1][0].stride()
        for eager, other in zip(*results, strict=True):
            assert torch.equal(eager, other)


@pytest.mark.parametrize("alpha_grad", [None, "exact", "three_valued", "chain"])
@pytest.mark.parametrize("ste", oracle.STES)
def test_compile_with_dynamic_shapes(reference_or_native, fresh_compiler, ste, alpha_grad):
    def function(x, alpha):
        return cg.qrelu(x * 2, alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact", channel_dim=1) * 3

    def make_inputs(size):
        alpha = CHANNEL_ALPHA.clone().requires_grad_(alpha_grad is not None)
        return sample(size, 3, 4, 5).requires_grad_(), alpha

    eager_and_compiled(function, make_inputs, (2, 5), "aot_eager")


@pytest.mark.parametrize("fused", [False, True])
def test_lsq_compiles_once_for_all_lengths(reference_or_native, fresh_compiler, fused):
    """The elements of a sample, of which it is made, are counted as the program runs."""
    activation, layer = cg.QReLU(2, learn_alpha=True, alpha_scale="lsq"), nn.Linear(8, 4)
    model = cg.nn.QReLULinear(activation, layer) if fused else nn.Sequential(activation, layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    graphs = set()
    for length in (3, 4, 7, 19):
        x, gradients = sample(2, length, 8), []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            gradients.append(activation.alpha.grad)
        assert torch.equal(*gradients) and gradients[0] != 0
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@pytest.mark.parametrize("alpha_grad", [None, "exact", "three_valued"])
@pytest.mark.parametrize("ste", oracle.MASKED_STES)
def test_compile_in_place(reference_or_native, fresh_compiler, ste, alpha_grad):
    def function(x, alpha):
        hidden = x * 2
        inplace = not oracle.saves_x(ste, alpha_grad)
        y = cg.qrelu(hidden, alpha, 2, ste=ste, alpha_grad=alpha_grad or "exact", inplace=inplace)
        return y + hidden

    def make_inputs(size):
        return sample(size, 7).requires_grad_(), ALPHA.clone().requires_grad_(alpha_grad is not None)

    eager_and_compiled(function, make_inputs, (2, 5), "aot_eager")


def test_compile_in_place_on_an_input(reference_or_native, fresh_compiler):
    """Without a gradient the graph's own input is overwritten, as in eager mode."""
    compiled = torch.compile(lambda x: cg.qrelu(x, ALPHA, 2, inplace=True), fullgraph=True, backend="aot_eager")
    x = sample(50)
    want = oracle.output(x, ALPHA, 2, "ceil")
    assert torch.equal(compiled(x), want) and torch.equal(x, want)


def test_compile_codes_and_dequantize(reference_or_native, fresh_compiler):
    def function(x):
        return cg.dequantize(cg.qrelu_codes(x, ALPHA, 3), ALPHA, 3, x.shape, x.dtype)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 8, 13):
        x = sample(size, 7)
        assert torch.equal(compiled(x), oracle.output(x, ALPHA, 3, "ceil"))


class Network(nn.Module):
    """Conv, batch norm and QReLU in a row, in place and out of place, fixed and learned."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3, affine=False),
            cg.QReLU(2, inplace=True),
            nn.Conv2d(3, 4, 3),
            cg.QReLU(2, learn_alpha=True, num_channels=4),
            nn.Flatten(),
            nn.Linear(4 * 4 * 4, 5),
            cg.QReLU(4, ste="reverse_exponential", rounding="hwgq"),
        )

    def forward(self, x):
        return self.body(x)


def make_network():
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_a_network(reference_or_native, fresh_compiler, compiler):
    """The whole thing, with the default compiler as well: same loss, same gradients to rounding."""
    plain, other = make_network(), make_network()
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=compiler)
    for size in (3, 6):
        losses = [network(sample(size, 1, 8, 8)).square().sum() for network in (plain, compiled)]
        for loss in losses:
            loss.backward()
        assert torch.allclose(*losses, rtol=1e-4)
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4), name
    assert plain.body[4].alpha.grad.abs().sum() > 0


def test_compile_under_no_grad(reference_or_native, fresh_compiler):
    network = make_network().eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = sample(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), network(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_a_network(reference_or_native, strict):
    network = make_network().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (sample(3, 1, 8, 8),), dynamic_shapes={"x": {0: batch}}, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("coarsegrad.qrelu" in name for name in names) == 3
    with torch.no_grad():
        for size in (2, 5):
            x = sample(size, 1, 8, 8, seed=size)
            assert torch.equal(program.module()(x), network(x))
    lowered = program.run_decompositions()
    x = sample(4, 1, 8, 8, seed=9)
    with torch.no_grad():
        assert torch.allclose(lowered.module()(x), network(x), rtol=1e-5, atol=1e-6)


def test_autocast_keeps_bfloat16(reference_or_native):
    """In bfloat16, out bfloat16, gradient bfloat16; float32 stays float32 too."""
    linear, layer = nn.Linear(8, 8), cg.QReLU(2, learn_alpha=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = linear(sample(4, 8))
        y = layer(hidden)
        assert hidden.dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, oracle.output(hidden, layer.alpha, 2, "ceil"))
        assert layer(sample(4, 8)).dtype == torch.float32
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and layer.alpha.grad.dtype == torch.float32
