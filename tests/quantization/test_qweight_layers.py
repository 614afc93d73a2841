"""`QWeight`: what a layer computes with it, and what torch's tools do with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_layers import mlp, original, put_on
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg

BITS = (8, 4, 2, 1)
LAYERS = {
    "linear": (lambda: nn.Linear(12, 6), (3, 12), F.linear),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), lambda *a: F.conv1d(*a, groups=2)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7), F.conv2d),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), F.conv3d),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), F.conv_transpose1d),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), F.conv_transpose2d),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (2, 4, 3, 3, 3), F.conv_transpose3d),
}


def expected(layer, weight, bits):
    return cg.qweight(weight, bits, channel_dim=1 if "Transpose" in type(layer).__name__ else 0)


# ------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_quantized_weights(kind, bits):
    make, shape, function = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    weight = layer.weight
    want = expected(layer, weight.detach(), bits).requires_grad_()
    y = function(x, want, layer.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), want)
    cg.quantize_(layer, None, weight_bits=bits)
    got = layer(x)
    got.square().sum().backward()
    assert torch.equal(got, y) and torch.equal(weight.grad, grad)
    assert original(layer) is weight and torch.equal(layer.weight, want)


@pytest.mark.parametrize("bits", BITS)
def test_a_grouped_transposed_convolution_has_a_scale_per_output_channel(bits):
    layer = nn.ConvTranspose2d(6, 9, 3, groups=3)
    w = layer.weight.detach()
    want = torch.cat([cg.qweight(part, bits, channel_dim=1) for part in w.chunk(3)])
    cg.quantize_(layer, None, weight_bits=bits)
    assert torch.equal(layer.weight, want)
    codes, scale = layer.parametrizations.weight[0].codes(w)
    assert codes.dtype == torch.int8 and scale.shape == (9,)
    steps = scale.view(3, 1, 3, 1, 1).expand(3, 2, 3, 1, 1).reshape(6, 3, 1, 1)
    assert torch.equal(codes * steps, want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ste", ["clipped", "trust"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_that_are_zero_outside(kind, bits, ste, packed):
    """What qweight's gradient is, whatever the layer saves."""
    make, shape, function = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    weight = layer.weight
    with torch.no_grad():
        weight.mul_(weight.abs())  # heavy tails
    leaf = weight.detach().clone().requires_grad_()
    want = cg.qweight(leaf, bits, channel_dim=1 if "Transpose" in type(layer).__name__ else 0, ste=ste)
    function(x, want, layer.bias).square().sum().backward()
    report = cg.quantize_(layer, None, weight_bits=bits, weight_ste=ste)
    assert layer.parametrizations.weight[0].ste == ste
    with cg.packed_activations() if packed else torch.enable_grad():
        y = layer(x).square().sum()
    y.backward()
    assert torch.equal(weight.grad, leaf.grad) and weight.grad.any()
    assert bits > 2 or ste == "trust" or (weight.grad == 0).any()
    report.undo()


def test_gradients_that_are_zero_outside_of_a_grouped_transposed_convolution():
    layer, x = nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)
    weight = layer.weight.detach().clone()
    put_on(layer, 2, channel_dim=1, groups=2, ste="clipped")
    layer(x).square().sum().backward()
    parts = weight.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)  # a row for each output channel
    outside = parts.abs() > cg.weight_scale(parts, 2)[:, None, None, None]
    grad = original(layer).grad.unflatten(0, (2, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(grad == 0, outside) and outside.any()


def test_one_scale_for_a_whole_weight():
    layer = put_on(nn.Linear(8, 4), 2, channel_dim=None)
    assert torch.equal(layer.weight, cg.qweight(original(layer), 2, channel_dim=None))
    assert layer.weight.unique().numel() == 3


def test_its_repr():
    texts = [
        repr(cg.QWeight(*args, **more))
        for args, more in (((2,), {}), ((1, None), {"ste": "trust"}), ((4, 1), {"groups": 2}))
    ]
    assert texts == [
        "QWeight(bits=2)",
        "QWeight(bits=1, channel_dim=None, ste='trust')",
        "QWeight(bits=4, channel_dim=1, groups=2)",
    ]


# ------------------------------------------------------------------------------------ torch's own tools


def test_a_state_dict_round_trip():
    model, other = mlp(), mlp()
    for m in (model, other):
        cg.quantize_(m, 4, weight_bits=2)
    assert set(model.state_dict()) >= {"0.parametrizations.weight.original", "0.bias"}
    other.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(other(x), model(x)) and torch.equal(original(other[0]), original(model[0]))
    floats = mlp()
    with pytest.raises(RuntimeError, match="parametrizations.weight.original"):
        floats.load_state_dict(model.state_dict())


def test_deep_copies_are_independent_and_pickles_are_refused():
    model, x = mlp(), torch.randn(5, 8)
    report = cg.quantize_(model, 4, weight_bits=2)
    twin = copy.deepcopy(model)
    want = model(x)
    with torch.no_grad():
        original(twin[0]).neg_()
    assert torch.equal(model(x), want) and not torch.equal(twin(x), want)
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)
    report.undo()  # the copy shares its layers' classes
    assert torch.equal(twin[0].weight, cg.qweight(original(twin[0]), 2))


def test_an_optimizer_made_before_goes_on():
    model, x = mlp(), torch.randn(16, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    report = cg.quantize_(model, 4, weight_bits=1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = original(model[0]).detach().clone()
        optimizer.step()
        average.update_parameters(model)
    after = original(model[0]).detach()
    assert not torch.equal(after, before)
    assert torch.equal(original(average.module[0]), torch.lerp(after, before, 0.5))
    report.undo()
    assert torch.equal(model[0].weight, after) and model[0].weight is optimizer.param_groups[0]["params"][0]


@pytest.mark.parametrize("quantized", [False, True])
def test_removal(quantized):
    model = mlp()
    cg.quantize_(model, None, weight_bits=2)
    weight, rounded = original(model[0]), model[0].weight
    want = rounded.clone() if quantized else weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=quantized)
    assert type(model[0]) is nn.Linear and model[0].weight is weight and torch.equal(weight, want)


def test_assigning_a_weight_sets_the_parameter():
    layer, new = put_on(nn.Linear(4, 4), 2), torch.randn(4, 4)
    layer.weight = new
    assert torch.equal(original(layer), new) and torch.equal(layer.weight, cg.qweight(new, 2))
    nn.init.ones_(original(layer))
    assert torch.equal(layer.weight, torch.ones(4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype(dtype):
    model = mlp()
    cg.quantize_(model, 4, weight_bits=4)
    model.to(dtype)
    assert model[0].weight.dtype == dtype and torch.equal(model[0].weight, cg.qweight(original(model[0]), 4))
    assert model(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_autocast():
    model, x = mlp(), torch.randn(3, 8)
    cg.quantize_(model, None, weight_bits=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    y.float().sum().backward()
    want = F.linear(x.bfloat16(), cg.qweight(original(model[0]).detach(), 2).bfloat16(), model[0].bias.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    assert original(model[0]).grad.dtype == torch.float32 and original(model[0]).grad.abs().sum() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    model, x = mlp(), torch.randn(6, 8, requires_grad=True)
    cg.quantize_(model, 4, weight_bits=2)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_compiled_without_graph_breaks():
    model, x = mlp(), torch.randn(6, 8)
    cg.quantize_(model, 4, weight_bits=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = mlp()
        cg.quantize_(model, 4, weight_bits=2)
    model.to_empty(device="cpu")
    nn.init.orthogonal_(original(model[0]))
    assert torch.equal(model[0].weight, cg.qweight(original(model[0]), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
def test_packed_a_layer_saves_the_codes_of_its_input_and_no_weight(kind, dtype):
    """Unpacked it saves Q(w), as many bytes as w. In bfloat16 by autocast."""
    grouped = (lambda: nn.ConvTranspose2d(6, 9, 3, groups=3), (2, 6, 4, 4), None)
    make, shape, _ = {**LAYERS, "grouped": grouped}[kind]
    layer, act, x = make(), cg.QReLU(4, ste="relu"), torch.randn(shape, requires_grad=True)
    cg.quantize_(layer, None, weight_bits=2)
    model = nn.Sequential(act, layer)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        whole = cg.saved_memory(model, x).total
        y = model(x)
        with cg.packed_activations():
            again = model(x)
        with cg.pack_activations_(model):
            packed = cg.saved_memory(model, x).total
    given = [x, *model.parameters()]
    grads = [torch.autograd.grad(out.float().square().sum(), given) for out in (y, again)]
    assert all(map(torch.equal, *grads))
    assert packed < whole - original(layer).numel() * dtype.itemsize
    if dtype == torch.float32:
        assert packed == x.numel() // 2 + act.alpha.nbytes


def test_a_weight_that_changes_before_the_backward_is_an_error():
    layer = put_on(nn.Linear(4, 4), 2)
    with cg.packed_activations():
        y = layer(torch.randn(2, 4, requires_grad=True))
    with torch.no_grad():
        original(layer).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
