"""QReLU: its defaults, its alpha, its state, and that networks made of it learn."""

from __future__ import annotations

import copy
import io
import pickle

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import coarsegrad as cg

# Best fixed alpha for a unit half-Gaussian, as the specification prints it.
HALF_GAUSSIAN = {
    "ceil": [0.7979, 0.4866, 0.2893, 0.1666, 0.0938, 0.0520, 0.0284, 0.0154],
    "hwgq": [0.7979, 0.5388, 0.3217, 0.1842, 0.1030, 0.0566, 0.0307, 0.0165],
    "nearest": [1.2240, 0.6508, 0.3534, 0.1932, 0.1055, 0.0573, 0.0309, 0.0165],
}


def sample(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_default_alpha_is_the_half_gaussian_optimum(rounding):
    for bits in range(1, 9):
        alpha = cg.QReLU(bits, rounding=rounding).alpha
        assert alpha.shape == (1,) and alpha.dtype == torch.float32
        assert alpha.item() == pytest.approx(HALF_GAUSSIAN[rounding][bits - 1], abs=5.1e-5)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_table_minimises_the_squared_error(rounding, bits):
    """No other alpha of a fine grid is better on half-Gaussian quantiles, beyond the table's last digit."""
    x = torch.distributions.HalfNormal(1.0).icdf((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    alpha = cg.QReLU(bits, rounding=rounding).alpha.double() * torch.linspace(0.9, 1.1, 41, dtype=torch.float64)
    y = oracle.output(x.expand(41, -1), alpha, bits, rounding, 0)
    best = (y - x).square().mean(1).argmin()
    assert abs(int(best) - 20) <= 1


def test_defaults(reference_or_native):
    layer, x = cg.QReLU(), sample(5, 6)
    assert layer.bits == 4 and layer.ste == "clipped_relu" and layer.rounding == "ceil"
    assert isinstance(layer, nn.Module) and list(layer.parameters()) == []
    assert torch.equal(layer(x), cg.qrelu(x, layer.alpha, 4))
    assert cg.QReLU(2)(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@pytest.mark.parametrize("ste", oracle.STES)
def test_the_module_is_the_function(reference_or_native, ste, rounding, alpha_grad):
    x = sample(4, 3, 5)
    layer = cg.QReLU(3, ste=ste, rounding=rounding, alpha=0.2, learn_alpha=True, alpha_grad=alpha_grad, num_channels=3)
    leaf, again, alpha = (
        x.clone().requires_grad_(),
        x.clone().requires_grad_(),
        torch.full((3,), 0.2).requires_grad_(),
    )
    y = layer(leaf)
    want = cg.qrelu(again, alpha, 3, ste=ste, rounding=rounding, alpha_grad=alpha_grad, channel_dim=1)
    y.backward(sample(4, 3, 5, seed=1))
    want.backward(sample(4, 3, 5, seed=1))
    assert torch.equal(y, want) and torch.equal(leaf.grad, again.grad) and torch.equal(layer.alpha.grad, alpha.grad)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_alpha_may_be_a_number(reference_or_native, dtype):
    x = sample(3, 50).to(dtype)
    step = torch.tensor([0.3], dtype=torch.float64)
    y = cg.qrelu(x, 0.3, 2)
    assert torch.equal(y, oracle.output(x, step, 2, "ceil"))
    assert torch.equal(cg.qrelu(x, 0.3, 2, channel_dim=0), y)
    assert torch.equal(cg.dequantize(cg.qrelu_codes(x, 0.3, 2), 0.3, 2, x.shape, dtype), y)
    assert torch.equal(cg.qrelu(x, 1, 2), oracle.output(x, torch.ones(1), 2, "ceil"))


def test_alpha_is_a_buffer_or_a_parameter():
    fixed, learned = cg.QReLU(2), cg.QReLU(2, learn_alpha=True)
    assert dict(fixed.named_buffers()).keys() == {"alpha"} and not list(fixed.parameters())
    assert dict(learned.named_parameters()).keys() == {"alpha"} and not list(learned.buffers())
    assert not fixed.alpha.requires_grad and isinstance(learned.alpha, nn.Parameter) and learned.alpha.requires_grad


def test_alpha_shapes():
    assert cg.QReLU(2).alpha.shape == (1,)
    assert cg.QReLU(2, alpha=0.3).alpha.tolist() == pytest.approx([0.3])
    assert cg.QReLU(2, alpha=torch.tensor([0.3])).alpha.tolist() == pytest.approx([0.3])
    per_channel = cg.QReLU(2, num_channels=3)
    assert per_channel.alpha.shape == (3,)
    assert per_channel.alpha.tolist() == pytest.approx([0.4866] * 3, abs=5.1e-5)
    assert cg.QReLU(2, alpha=0.3, num_channels=3).alpha.tolist() == pytest.approx([0.3] * 3)
    given = torch.tensor([0.1, 0.2, 0.3])
    layer = cg.QReLU(2, alpha=given, num_channels=3, learn_alpha=True)
    assert layer.alpha.tolist() == pytest.approx([0.1, 0.2, 0.3])
    with torch.no_grad():
        layer.alpha.fill_(1)
    assert given[0] == pytest.approx(0.1), "the layer has an alpha of its own"


@pytest.mark.parametrize("channel_dim", [0, 1, 2, -1, -2])
def test_channel_dim(reference_or_native, channel_dim):
    x = sample(3, 4, 5)
    alpha = oracle.log_uniform(x.size(channel_dim), 0.1, 1, seed=0)
    layer = cg.QReLU(2, alpha=alpha, num_channels=len(alpha), channel_dim=channel_dim)
    assert torch.equal(layer(x), oracle.output(x, alpha, 2, "ceil", channel_dim))


class Exp(nn.Module):
    """A parametrization by the logarithm."""

    def forward(self, log):
        return log.exp()

    def right_inverse(self, value):
        return value.log()


@pytest.mark.parametrize("parametrized", [False, True])
@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("values", [[0.5], [0.25, 2.0, 0.5]])
def test_alpha_is_set_in_place(reference_or_native, parametrized, learn_alpha, values):
    layer, x = cg.QReLU(2, learn_alpha=learn_alpha), sample(4, 3)
    if parametrized:
        parametrize.register_parametrization(layer, "alpha", Exp())
    layer(x).sum().backward() if learn_alpha else None
    tensors = [*layer.parameters(), *layer.buffers()]
    given = torch.tensor(values, dtype=torch.float64)
    layer._set_alpha(given, 1 if len(values) > 1 else None)
    assert all(map(lambda now, then: now is then, [*layer.parameters(), *layer.buffers()], tensors))
    assert layer.alpha.dtype == torch.float32 and layer.alpha.requires_grad is learn_alpha
    torch.testing.assert_close(layer.alpha.double(), given, rtol=1e-6 if parametrized else 0, atol=0)
    assert torch.equal(layer(x), oracle.output(x, layer.alpha, 2, "ceil", 1 if len(values) > 1 else None))
    if learn_alpha:
        layer(x).sum().backward()
        assert [p.grad.shape for p in layer.parameters()] == [given.shape]
    given.zero_()
    assert (layer.alpha > 0).all(), "the layer has an alpha of its own"


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("num_channels", [None, 3])
def test_state_dict_round_trip(learn_alpha, num_channels):
    layer = cg.QReLU(2, learn_alpha=learn_alpha, num_channels=num_channels)
    state = layer.state_dict()
    assert list(state) == ["alpha", "_extra_state"]
    with torch.no_grad():
        layer.alpha.mul_(3)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    other = cg.QReLU(2, learn_alpha=learn_alpha, num_channels=num_channels)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other.alpha, layer.alpha)
    swapped = cg.QReLU(2, learn_alpha=not learn_alpha, num_channels=num_channels)
    swapped.load_state_dict(layer.state_dict())
    assert torch.equal(swapped.alpha, layer.alpha), "a learned alpha can be loaded as a fixed one, and back"


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_deepcopy_and_pickle(reference_or_native, learn_alpha):
    layer = cg.QReLU(
        3,
        ste="relu",
        rounding="hwgq",
        alpha=0.2,
        learn_alpha=learn_alpha,
        alpha_grad="exact",
        num_channels=4,
        channel_dim=2,
    )
    x = sample(2, 3, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer) and torch.equal(twin.alpha, layer.alpha)
        assert twin.alpha.data_ptr() != layer.alpha.data_ptr() and type(twin.alpha) is type(layer.alpha)
        assert torch.equal(twin(x), layer(x))


def test_extra_repr_tells_what_differs():
    layer = cg.QReLU(
        3, ste="relu", rounding="hwgq", learn_alpha=True, alpha_grad="exact", num_channels=4, channel_dim=2
    )
    text = repr(layer)
    for word in ("QReLU", "bits=3", "relu", "hwgq", "exact", "4", "learn"):
        assert word in text
    assert "inplace" in repr(cg.QReLU(2, inplace=True))
    assert repr(cg.QReLU(2)).startswith("QReLU(")


def test_inplace(reference_or_native):
    layer, x = cg.QReLU(2, inplace=True), sample(6)
    want = oracle.output(x, layer.alpha, 2, "ceil")
    assert layer(x) is x and torch.equal(x, want)
    for options in (dict(ste="reverse_exponential"), dict(learn_alpha=True, alpha_grad="chain")):
        with pytest.raises(ValueError, match="(?i)in.?place"):
            cg.QReLU(2, inplace=True, **options)(sample(6).requires_grad_() * 1)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_conversion_to_other_dtypes(reference_or_native, dtype):
    layer = cg.QReLU(2).to(dtype)
    x = sample(50).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, oracle.output(x, layer.alpha, 2, "ceil"))


def test_eval_and_train_are_the_same(reference_or_native):
    layer, x = cg.QReLU(2), sample(50)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def tiny_task():
    """Two half-moons, 200 points."""
    t = torch.linspace(0, 3.14159, 100)
    upper = torch.stack([t.cos(), t.sin()], 1)
    lower = torch.stack([1 - t.cos(), 0.5 - t.sin()], 1)
    return torch.cat([upper, lower]) * 2, torch.cat([torch.zeros(100), torch.ones(100)]).long()


def train(layer, steps):
    x, label = tiny_task()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32, affine=False), layer, nn.Linear(32, 2))
    weights = [p for p in network.parameters() if p is not layer.alpha]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    if layer.alpha.requires_grad:
        optimizer.add_param_group({"params": [layer.alpha], "lr": 1e-3})
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("bits", [2, 4])
def test_a_tiny_network_learns(reference_or_native, ste, bits):
    losses = train(cg.QReLU(bits, ste=ste, inplace=ste in oracle.MASKED_STES), steps=40)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("alpha_grad", oracle.ALPHA_GRADS)
@pytest.mark.parametrize("num_channels", [None, 32])
def test_a_learned_alpha_learns(reference_or_native, alpha_grad, num_channels):
    layer = cg.QReLU(2, learn_alpha=True, alpha_grad=alpha_grad, num_channels=num_channels)
    before = layer.alpha.detach().clone()
    losses = train(layer, steps=15)
    assert losses[-1] < losses[0]
    assert layer.alpha.grad is not None and layer.alpha.grad.isfinite().all()
    assert (layer.alpha != before).any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_traced_and_not_scripted():
    fused = cg.nn.QReLULinear(cg.QReLU(2), nn.Linear(4, 2))
    for layer in (cg.QReLU(2, learn_alpha=True), nn.Sequential(nn.Linear(3, 4), cg.QReLU(2)), fused):
        with pytest.raises(TypeError, match="torch.jit.script cannot compile a QReLU; torch.jit.trace, "):
            torch.jit.script(layer)
    layer, x = cg.QReLU(2, learn_alpha=True), sample(5, 3)
    assert torch.equal(torch.jit.trace(layer, sample(5, 3, seed=1))(x), layer(x))
