"""Nested tensors: the staircase of their values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coarsegrad as cg

LAYOUTS = [torch.jagged, torch.strided]


def parts():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 8, generator=g) for n in (2, 5, 3)]


def nested(layout, **kwargs):
    return torch.nested.nested_tensor(parts(), layout=layout, **kwargs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alpha_scale", [1.0, "lsq"])
@pytest.mark.parametrize("ste", ["clipped_relu", "reverse_exponential", "reverse_exponential_step"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(reference_or_native, layout, ste, alpha_scale, packed):
    x = nested(layout, requires_grad=True)
    layer = cg.QReLU(2, ste=ste, alpha=0.3, learn_alpha=True, alpha_scale=alpha_scale)
    with cg.packed_activations() if packed else torch.enable_grad():
        y = layer(x)
        loss = (y * y).to_padded_tensor(0.0).sum()
    assert y.layout is layout and y.is_nested
    loss.backward()
    flat = torch.cat(parts()).requires_grad_()
    got, layer.alpha.grad = layer.alpha.grad, None
    if alpha_scale == "lsq":
        layer.alpha_scale = (80 // 3 * 3) ** -0.5  # 80 elements of 3 samples, and 3 levels
    want = layer(flat)
    (want * want).sum().backward()
    torch.testing.assert_close(got, layer.alpha.grad)
    assert torch.equal(torch.cat(y.unbind()), want)
    assert torch.equal(torch.cat(x.grad.unbind()), flat.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_alpha(layout):
    grads = []
    for x in (nested(layout), torch.cat(parts())):
        alpha = torch.tensor([0.3], requires_grad=True)
        y = cg.qrelu(x, alpha, 2, alpha_grad="exact")
        (y.to_padded_tensor(0.0) if y.is_nested else y).sum().backward()
        grads.append(alpha.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_gradients(layout, grad):
    with grad():
        x = nested(layout)
        for y in (cg.qrelu(x, 0.3, 2), cg.QReLU(2, alpha=0.3)(x)):
            assert torch.equal(torch.cat(y.unbind()), cg.qrelu(torch.cat(parts()), 0.3, 2))


@pytest.mark.parametrize("channel_dim", [2, -1])
def test_an_alpha_for_each_channel(channel_dim):
    alpha = torch.rand(8).add(0.1)
    y = cg.qrelu(nested(torch.jagged), alpha, 2, channel_dim=channel_dim)
    assert torch.equal(torch.cat(y.unbind()), cg.qrelu(torch.cat(parts()), alpha, 2, channel_dim=1))


@pytest.mark.parametrize("dim", [0, 1, 3, -4])
def test_a_dimension_of_no_one_size_is_refused(dim):
    with pytest.raises(
        ValueError, match=r"channel_dim must be a dimension of a nested x with a uniform size, one of \[2\], got"
    ):
        cg.qrelu(nested(torch.jagged), torch.ones(8), 2, channel_dim=dim)
    with pytest.raises(ValueError, match="channel_dim must be None for a nested tensor of layout torch.strided"):
        cg.qrelu(nested(torch.strided), torch.ones(8), 2, channel_dim=dim)


def test_a_transposed_one():
    y = cg.qrelu(nested(torch.jagged).transpose(1, 2), torch.tensor([0.3]), 2)
    assert all(torch.equal(a, cg.qrelu(b, 0.3, 2).t()) for a, b in zip(y.unbind(), parts(), strict=True))


def test_its_lengths_stay_its_own():
    """What comes after may add it to its input: they have one ragged size."""
    x = nested(torch.jagged)
    assert torch.equal((x + cg.qrelu(x, 0.3, 2)).values(), x.values() + cg.qrelu(x.values(), 0.3, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fused_linear(layout):
    layer = cg.nn.QReLULinear(cg.QReLU(2, alpha=0.3), nn.Linear(8, 4))
    y = layer(nested(layout))
    want = F.linear(cg.qrelu(torch.cat(parts()), 0.3, 2), layer.layer.weight, layer.layer.bias)
    torch.testing.assert_close(torch.cat(y.unbind()), want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_refused(layout):
    x = nested(layout)
    for ste in ("clipped_relu", "reverse_exponential_step"):
        with pytest.raises(NotImplementedError, match="inplace=True takes no nested tensor; use inplace=False"):
            cg.qrelu(x, torch.tensor([0.3]), 2, ste=ste, inplace=True)
    with pytest.raises(TypeError, match="x must be a dense Tensor, got a nested one"):
        cg.qrelu_codes(x, 0.3, 2)
    with pytest.raises(ValueError, match="alpha must have shape"):
        cg.qrelu(x, torch.ones(2), 2)
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        cg.qrelu(x, torch.tensor([-1.0]), 2)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_transformer_encoder_that_nests_padded_batches(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    cg.quantize_(model, bits=4, alpha=0.1)
    model.use_nested_tensor = True  # which the conversion has switched off
    x, padding = torch.randn(3, 10, 32), torch.arange(10) >= torch.tensor([10, 6, 3])[:, None]
    seen = []
    for module in model.modules():
        if isinstance(module, cg.QReLU):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_nested))
    with grad():
        got = model(x, src_key_padding_mask=padding)
        assert seen == [grad is not torch.enable_grad] * 2
        want = torch.cat([model(x[i : i + 1, :n])[0] for i, n in enumerate((10, 6, 3))])
    torch.testing.assert_close(got[~padding], want)
