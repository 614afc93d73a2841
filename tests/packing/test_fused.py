"""A qrelu and the layer after it as one function: the same bits as the pair, eager and compiled, and what is kept."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("reference_or_native")


def tensors(kind, dtype=torch.float32, channels_last=False):
    torch.manual_seed(0)
    if kind == "linear":
        shapes = (3, 7, 24), (10, 24), (10,)
    else:
        shapes = (2, 6, 9, 8), (4, 3, 3, 2), (4,)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    alpha = torch.full((x.size(1),), 0.3) * torch.linspace(0.5, 1.5, x.size(1))
    return tuple(t.requires_grad_() for t in (x, alpha, weight, bias))


LAYER = {"stride": (2, 1), "padding": 1, "dilation": (1, 2), "groups": 2}


def fused(kind, x, alpha, weight, bias, bits=2, **settings):
    if kind == "linear":
        return cg.qrelu_linear(x, alpha, weight, bias, bits, **settings)
    return cg.qrelu_conv2d(x, alpha, weight, bias, bits, **LAYER, **settings)


def pair(kind, x, alpha, weight, bias, bits=2, **settings):
    y = cg.qrelu(x, alpha, bits, **settings)
    return F.linear(y, weight, bias) if kind == "linear" else F.conv2d(y, weight, bias, **LAYER)


def run(function, kind, inputs, **settings):
    """The output and the gradient of every input that requires one, None for the others."""
    out = function(kind, *inputs, **settings)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    grads = iter(torch.autograd.grad(out.float().square().sum(), wanted) if wanted else ())
    return [out, *(next(grads) if t is not None and t.requires_grad else None for t in inputs)]


def assert_same(got, want):
    for a, b, name in zip(got, want, ("out", "x", "alpha", "weight", "bias")):
        assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d channels-last"])
def test_the_same_bits_as_the_pair(kind, ste, dtype):
    kind, channels_last = kind.split()[0], "last" in kind
    for rounding in oracle.ROUNDINGS:
        for alpha_grad in oracle.ALPHA_GRADS:
            inputs = tensors(kind, dtype, channels_last)
            settings = {"ste": ste, "rounding": rounding, "alpha_grad": alpha_grad, "channel_dim": 1}
            want = run(pair, kind, inputs, **settings)
            assert all(g.any() for g in want)
            assert_same(run(fused, kind, inputs, **settings), want)
        x, _, weight, bias = tensors(kind, dtype, channels_last)
        inputs = (x, torch.tensor([0.3]), weight, bias)
        settings = {"ste": ste, "rounding": rounding}
        assert_same(run(fused, kind, inputs, **settings), run(pair, kind, inputs, **settings))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_whatever_is_frozen(kind):
    for frozen in range(16):
        for ste in ("relu", "clipped_relu", "reverse_exponential"):
            inputs = [t.requires_grad_(not frozen >> i & 1) for i, t in enumerate(tensors(kind))]
            for given in (inputs, [*inputs[:3], None]):
                settings = {"ste": ste, "alpha_grad": "exact", "channel_dim": 1}
                assert_same(run(fused, kind, given, **settings), run(pair, kind, given, **settings))


def test_shapes_of_a_linear():
    _, _, weight, bias = tensors("linear")
    for shape in ((24,), (0, 24), (5, 24), (2, 1, 3, 24)):
        x = torch.randn(shape, requires_grad=True)
        inputs = (x, torch.tensor([0.3]), weight, bias)
        for got, want in zip(run(fused, "linear", inputs), run(pair, "linear", inputs)):
            assert (got is None and want is None) or (
                torch.equal(got, want) if len(shape) > 1 else torch.allclose(got, want, atol=1e-5)
            )


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("ste", oracle.MASKED_STES)
def test_bytes_kept(ste, bits):
    n, width = 3 * 7 * 24, oracle.CODE_WIDTH[bits]
    x, _, weight, bias = tensors("linear", torch.bfloat16)
    alpha = torch.tensor([0.3])
    for rounding in oracle.ROUNDINGS:
        for trainable in (True, False):
            weight.requires_grad_(trainable)
            with Kept(alpha, weight, bias) as kept:
                out = fused("linear", x, alpha, weight, bias, bits, ste=ste, rounding=rounding)
            mask = ste in ("clipped_relu", "trust") or (ste == "relu" and (rounding == "nearest" or not trainable))
            assert kept.bytes == n * (width * trainable + mask) // 8
            out.float().sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("ste", ["relu", "clipped_relu", "reverse_exponential"])
def test_compiled_with_one_graph(kind, ste):
    torch._dynamo.reset()
    for learned in (False, True):
        inputs = tensors(kind)
        inputs[1].requires_grad_(learned)
        settings = {"ste": ste, "alpha_grad": "exact", "channel_dim": 1}
        compiled = torch.compile(lambda *a: fused(kind, *a, **settings), fullgraph=True, backend="aot_eager")
        want = run(pair, kind, inputs, **settings)
        assert_same(run(lambda kind, *a: compiled(*a), kind, inputs), want)


def test_compiled_code_keeps_the_codes():
    """With the partitioner that the default backend has, which may compute again what it does not keep."""
    torch._dynamo.reset()
    from functorch.compile import min_cut_rematerialization_partition, nop
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=nop, partition_fn=min_cut_rematerialization_partition)
    x, _, weight, bias = tensors("linear", torch.bfloat16)
    alpha, n = torch.tensor([0.3]), x.numel()
    for ste, width in (("relu", 2), ("clipped_relu", 3)):
        compiled = torch.compile(lambda x: fused("linear", x, alpha, weight, bias, ste=ste), backend=backend)
        compiled(x)
        with Kept(alpha, weight, bias) as kept:
            out = compiled(x)
        assert kept.bytes == n * width // 8
        (grad,) = torch.autograd.grad(out.float().square().sum(), x)
        want = pair("linear", x, alpha, weight, bias, ste=ste)
        assert torch.equal(grad, torch.autograd.grad(want.float().square().sum(), x)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_the_default_backend(dynamic):
    torch._dynamo.reset()
    inputs = tensors("linear")
    compiled = torch.compile(lambda *a: fused("linear", *a, channel_dim=2), fullgraph=True, dynamic=dynamic)
    inputs = (inputs[0], torch.full((24,), 0.3), *inputs[2:])
    want = run(pair, "linear", inputs, channel_dim=2)
    for a, b in zip(run(lambda kind, *a: compiled(*a), "linear", inputs), want):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_autocast(kind):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tensors(kind)
        inputs = (inputs[0].detach().to(dtype).requires_grad_(), *inputs[1:])
        found = []
        for function in (fused, pair):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(run(function, kind, inputs, channel_dim=1))
        assert_same(*found)
        assert found[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_no_second_derivative(kind):
    """That of grad_weight goes through y to x, which is not kept."""
    x, _, weight, bias = tensors(kind)
    out = fused(kind, x, torch.tensor([0.3]), weight, bias)
    with pytest.raises(NotImplementedError, match="second derivative; use qrelu and the layer one after the other"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_it_runs_again_in_a_checkpoint_and_inside_of_packed_activations():
    inputs = tensors("linear")
    want = run(pair, "linear", inputs, channel_dim=1)

    def checkpointed(kind, *inputs, **settings):
        return torch.utils.checkpoint.checkpoint(fused, kind, *inputs, use_reentrant=False, **settings)

    assert_same(run(checkpointed, "linear", inputs, channel_dim=1), want)
    with cg.packed_activations():
        assert_same(run(fused, "linear", inputs, channel_dim=1), want)


def test_wrong_arguments():
    x, _, weight, bias = tensors("linear")
    with pytest.raises(ValueError, match="finite and > 0"):
        cg.qrelu_linear(x, torch.tensor([0.0]), weight, bias)
    with pytest.raises(ValueError, match="unknown ste 'no'"):
        cg.qrelu_linear(x, 0.3, weight, bias, ste="no")
    with pytest.raises(RuntimeError, match="mat1 and mat2|shapes"):
        cg.qrelu_linear(x, 0.3, weight[:, 1:], bias)
    with pytest.raises(RuntimeError, match="dtype"):
        cg.qrelu_linear(x, 0.3, weight.double(), bias)
    image, _, kernel, bias = tensors("conv2d")
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\], got shape \[6, 9, 8\]"):
        cg.qrelu_conv2d(image[0], 0.3, kernel, bias)
    with pytest.raises(ValueError, match="padding must be an int or two of them, got 'same'"):
        cg.qrelu_conv2d(image, 0.3, kernel, bias, padding="same")


# --------------------------------------------------------------------------------------------- modules


class LoRA(nn.Module):
    """An adapter around a Linear, as they are written: out = base(x) + up(down(x))."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def module_gradients(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


MODULES = {
    "linear": (lambda: cg.nn.QReLULinear(cg.QReLU(2, learn_alpha=True), nn.Linear(24, 10)), (5, 24)),
    "conv2d": (lambda: cg.nn.QReLUConv2d(cg.QReLU(2, ste="relu"), nn.Conv2d(4, 6, 3, padding=1)), (2, 4, 7, 7)),
    "conv2d same": (lambda: cg.nn.QReLUConv2d(cg.QReLU(2), nn.Conv2d(4, 6, 3, padding="same")), (2, 4, 7, 7)),
    "conv2d reflect": (
        lambda: cg.nn.QReLUConv2d(cg.QReLU(2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        (2, 4, 7, 7),
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_modules(case):
    make, shape = MODULES[case]
    module, x = make(), torch.randn(shape)
    unfused = nn.Sequential(module.activation, module.layer)
    for got, want in zip(module_gradients(module, x), module_gradients(unfused, x)):
        assert torch.equal(got, want)
    twin = make()
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize("which", ["before", "after", "both"])
def test_lora_on_either_linear(which):
    torch.manual_seed(0)
    first = nn.Linear(16, 24)
    fused_pair = cg.nn.QReLULinear(cg.QReLU(2, ste="relu"), nn.Linear(24, 10))
    if which in ("before", "both"):
        first = LoRA(first)
    if which in ("after", "both"):
        fused_pair.layer = LoRA(fused_pair.layer)
    x = torch.randn(5, 16)
    model = nn.Sequential(first, fused_pair)
    want = module_gradients(nn.Sequential(first, fused_pair.activation, fused_pair.layer), x)
    assert len(want) > 1
    for got, expected in zip(module_gradients(model, x), want):
        assert torch.equal(got, expected)
    # The frozen base keeps nothing; what LoRA's own `down` keeps of its input are the codes.
    with Kept(x, *model.parameters(), *model.buffers()) as kept:
        out = fused_pair(x @ torch.randn(16, 24, requires_grad=True))
    assert kept.bytes < 5 * 24 * 4
    out.sum().backward()


def test_a_hook_of_the_layer_still_runs():
    module, seen = MODULES["linear"][0](), []
    for part in (module.layer, module.activation):
        handle = part.register_forward_hook(lambda *args: seen.append(args[0]))
        module(torch.randn(5, 24))
        assert seen == [part]
        handle.remove()
        seen.clear()


def test_modules_want_a_qrelu_and_a_module():
    with pytest.raises(TypeError, match="activation must be a QReLU, got ReLU"):
        cg.nn.QReLULinear(nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="layer must be an nn.Module, got int"):
        cg.nn.QReLULinear(cg.QReLU(2), 3)


def test_a_compiled_module():
    torch._dynamo.reset()
    module, x = MODULES["linear"][0](), torch.randn(5, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(module_gradients(compiled, x), module_gradients(module, x)):
        assert torch.equal(got, want)
    module.layer = LoRA(module.layer)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, want in zip(module_gradients(compiled, x), module_gradients(module, x)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_flops_are_those_of_the_layer(kind):
    module, shape = MODULES[kind][0](), MODULES[kind][1]
    unfused = nn.Sequential(module.activation, module.layer)

    def flops(model, x):
        with FlopCounterMode(display=False) as counter:
            out = model(x)
            if out.requires_grad:
                out.sum().backward()
        return counter.get_total_flops()

    for trainable in (True, False):
        module.layer.weight.requires_grad_(trainable)
        x = torch.randn(shape, requires_grad=True)
        assert flops(module, x) == flops(unfused, x) > 0
    with torch.inference_mode():
        assert flops(module.requires_grad_(False), x.detach()) == flops(unfused, x.detach()) > 0
