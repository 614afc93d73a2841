"""A Linear, a QReLU and a Linear as one op: the bits of the three, x and codes alone kept, and what replaces them."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
import torch.distributed as dist
from mlp_models import GATES, apart, assert_same, chain, gated, rows
from saved_bytes import Kept
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import coarsegrad as cg
from coarsegrad._types import CODE_WIDTH, ROUNDINGS


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("ste", oracle.STES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_are_those_of_the_three(dtype, rounding, ste, squared):
    model = chain(3, dtype, ste=ste, rounding=rounding, squared=squared)
    for x in (rows(3, 5, 24, dtype=dtype), rows(24, dtype=dtype), rows(0, 24, dtype=dtype)):
        assert_same(model, x.requires_grad_())
        with torch.no_grad():
            assert torch.equal(model(x), apart(model, x))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ste", GATES)
def test_what_is_kept(ste, rounding, bits):
    """b / 8 bytes of codes an element of h, and 1 / 8 of a gate that they do not give; of y and h nothing."""
    model = chain(bits, ste=ste, rounding=rounding)
    x, elements = rows(6, 24).requires_grad_(), 6 * 40
    gate = ste in ("clipped_relu", "trust") or (ste == "relu" and rounding == "nearest")
    with Kept(x, *model.parameters(), model.activation.alpha) as kept:
        out = model(x)  # which keeps them
    assert out.requires_grad
    assert kept.bytes == elements * (CODE_WIDTH[bits] + gate) // 8
    model.layer.weight.requires_grad_(False)
    by_codes = ste == "relu" and rounding != "nearest"
    with Kept(x, *model.parameters(), model.activation.alpha) as kept:
        out = model(x)  # which keeps them
    assert out.requires_grad
    assert kept.bytes == elements * (CODE_WIDTH[bits] * by_codes + gate) // 8
    assert_same(model, x)


def test_what_is_not_needed_is_not_kept_or_computed():
    model = chain(ste="clipped_relu").requires_grad_(False)
    for name in ("first.weight", "first.bias", "layer.weight", "layer.bias"):
        parameter = model.get_parameter(name).requires_grad_()
        x = rows(6, 24)
        assert_same(model, x)
        parameter.requires_grad_(False)
    with Kept(*model.parameters(), model.activation.alpha) as kept:
        out = model(x)
    assert kept.bytes == 0 and not out.requires_grad
    assert_same(model, x.requires_grad_())
    assert_same(chain(bias=False), x)


@pytest.mark.parametrize("ste", GATES)
def test_a_square_is_read_from_the_codes(ste):
    model, x = chain(4, ste=ste, squared=True), rows(6, 24).requires_grad_()
    gate = ste in ("clipped_relu", "trust")
    for trained in (True, False):  # the gradient of the square needs the codes too
        model.layer.weight.requires_grad_(trained)
        with Kept(x, *model.parameters(), model.activation.alpha) as kept:
            out = model(x)
        assert out.requires_grad and kept.bytes == 6 * 40 * (4 + gate) // 8


def test_other_settings_run_one_after_the_other():
    """A learned or a per feature alpha, dropout; they keep what they need."""
    x = rows(6, 24).requires_grad_()
    assert_same(chain(learn_alpha=True), x)
    assert_same(chain(num_channels=40, channel_dim=-1), x)
    assert_same(chain(squared=True, learn_alpha=True), x)
    assert_same(chain(squared=True, num_channels=40, channel_dim=-1), x)
    model = chain(dropout=0.5)
    torch.manual_seed(2)
    out = model(x)
    torch.manual_seed(2)
    assert torch.equal(out, apart(model, x))
    assert_same(model.eval(), x)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_modules_in_its_place():
    """Adapters on either Linear, hooks, subclasses."""
    x = rows(6, 24).requires_grad_()
    for name in ("first", "layer"):
        model = chain(ste="relu")
        setattr(model, name, Lora(getattr(model, name)))
        assert_same(model, x)
    seen = []
    for name in ("first", "activation", "layer"):
        model = chain()
        model.get_submodule(name).register_forward_hook(lambda module, *_: seen.append(type(module)))
        assert_same(model, x)
    assert seen == [nn.Linear] * 2 + [cg.QReLU] * 2 + [nn.Linear] * 2  # in the chain, and apart
    assert set(chain().state_dict()) == {
        "first.weight", "first.bias", "activation.alpha", "activation._extra_state", "layer.weight", "layer.bias"
    }  # fmt: skip


def test_nested_and_sharded_rows():
    model, x = chain(ste="relu"), rows(6, 24)
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    assert torch.equal(model(nested).values(), model(x))
    model.layer.weight.grad = None
    model(nested).values().sum().backward()
    got = model.layer.weight.grad
    assert torch.equal(got, torch.autograd.grad(apart(model, x).sum(), model.layer.weight)[0])


def test_deepcopy_autocast_and_compile():
    model, x = copy.deepcopy(chain()), rows(6, 24).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(model, x, compiled)
    assert_same(model, rows(9, 24).requires_grad_(), compiled)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = model(x), apart(model, x)
        assert out.dtype == torch.bfloat16 and torch.equal(out, want)
        with Kept(x, *model.parameters(), model.activation.alpha) as kept:
            out = compiled(x)
    # Copies in bfloat16 of x and of both weights, of which autocast saves as many; codes and gates of h.
    assert kept.bytes == 2 * (6 * 24 + 40 * 24 + 8 * 40) + 6 * 40 * 3 // 8


@pytest.fixture
def group(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("error:.*returned a view tensor")
def test_checkpointed_replicated_and_sharded(group):
    """Sharded as one it is one op; with its parts sharded by themselves they run apart, with their hooks."""
    model, x = chain(ste="clipped_relu"), rows(6, 24)
    want = apart(model, x)
    grads = torch.autograd.grad(want.square().sum(), list(model.parameters()))

    def one(model):
        return fully_shard(model, mesh=group)

    def parts(model):
        fully_shard(model.first, mesh=group), fully_shard(model.layer, mesh=group)
        return fully_shard(model, mesh=group)

    for wrap in (DistributedDataParallel, one, parts):
        wrapped = wrap(copy.deepcopy(model))
        out = wrapped(x)
        out.square().sum().backward()
        assert torch.equal(out, want)
        for parameter, grad in zip(wrapped.parameters(), grads, strict=True):
            got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            assert torch.equal(got, grad)
    out = checkpoint(model, x, use_reentrant=False)
    assert torch.equal(out, want)
    for got, grad in zip(torch.autograd.grad(out.square().sum(), list(model.parameters())), grads, strict=True):
        assert torch.equal(got, grad)


@pytest.mark.parametrize("learn_alpha", [False, True])
def test_a_sharded_gated_mlp(group, learn_alpha):
    model, x = gated(learn_alpha=learn_alpha), rows(6, 24)
    want = model(x)
    grad = torch.autograd.grad(want.sum(), model.down.weight)[0]
    out = distribute_module(model, group)(distribute_tensor(x, group, [Shard(0)]))
    assert torch.equal(out.full_tensor(), want)
    out.sum().backward()
    torch.testing.assert_close(model.down.weight.grad.full_tensor(), grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, for an op of torch.ops.coarsegrad
@pytest.mark.parametrize("build", [chain, gated])
def test_transforms_and_second_derivatives(build):
    model, x = build(ste="relu"), rows(6, 24).requires_grad_()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x.detach()[:, None])
    for name, grad in torch.func.grad(loss)(weights, x.detach()).items():
        torch.testing.assert_close(per_row[name].sum(0), grad)
    with pytest.raises(NotImplementedError, match="qrelu_mlp and qrelu_gated_mlp have no second derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("build", [chain, gated])
def test_flops_are_those_of_the_layers(build):
    model, x = build(), rows(6, 24).requires_grad_()
    counts = []
    for call in (model, lambda x: apart(model, x)):
        with FlopCounterMode(display=False) as counter:
            call(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_nan_makes_its_row_nan():
    model, x = chain(ste="relu"), rows(6, 24)
    x[2, 3] = torch.nan
    for x in (x, x.clone().requires_grad_()):
        assert model(x).isnan().all(1).tolist() == [i == 2 for i in range(6)]
        assert not model(x)[[0, 1, 3, 4, 5]].isnan().any()


def test_it_converts_as_the_three():
    model = nn.Sequential(nn.Linear(20, 24), cg.QReLU(4), chain(4)).eval()
    plain = nn.Sequential(*model[:2], model[2].first, model[2].activation, model[2].layer).eval()
    x = rows(8, 20)
    converted = cg.convert(model, (x,))
    assert torch.equal(converted(x), cg.convert(plain, (x,))(x))
    assert "2.first" in str(converted.report) and "2.layer" in str(converted.report)


def test_dtypes_are_those_of_x():
    """Also where codes, which have none, are between the two Linears."""
    x, first, layer = rows(3, 4), nn.Linear(4, 8), nn.Linear(8, 2)
    for name in ("weight1", "bias1", "weight2", "bias2"):
        given = {"weight1": first.weight, "bias1": first.bias, "weight2": layer.weight, "bias2": layer.bias}
        given[name] = given[name].double()
        with pytest.raises(TypeError, match=f"{name} must be torch.float32, as x, got torch.float64"):
            cg.qrelu_mlp(x, alpha=0.3, **given)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{name} must be torch.bfloat16"):
            cg.qrelu_mlp(x, alpha=0.3, **given)  # autocast converts no double


def test_bad_input():
    first, activation, layer = nn.Linear(4, 8), cg.QReLU(), nn.Linear(8, 2)
    for arguments, wanted in (
        ((first, nn.ReLU(), layer), "activation must be a QReLU, got ReLU"),
        ((None, activation, layer), "first must be an nn.Module, got NoneType"),
        ((first, activation, 3), "layer must be an nn.Module, got int"),
    ):
        with pytest.raises(TypeError, match=wanted):
            cg.nn.QReLUMLP(*arguments)
    x, weights = rows(3, 4), (first.weight, first.bias, 0.3, layer.weight, layer.bias)
    for wrong, error, match in (
        ({"bits": 9}, ValueError, "bits"), ({"bits": "4"}, TypeError, "bits"), ({"ste": "sign"}, ValueError, "ste"),
        ({"rounding": "down"}, ValueError, "rounding"), ({"channel_dim": 7}, (ValueError, IndexError), "channel_dim"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            cg.qrelu_mlp(x, *weights, **wrong)
    with pytest.raises(ValueError, match="alpha must be finite and > 0"):
        cg.qrelu_mlp(x, first.weight, None, torch.tensor([-1.0]), layer.weight)
    with pytest.raises(TypeError, match="must be Tensor"):
        cg.qrelu_mlp([1.0], *weights)
    with pytest.raises(ValueError, match=r"alpha must have 8 elements|alpha"):
        cg.qrelu_mlp(x, first.weight, None, torch.full((4,), 0.3), layer.weight, channel_dim=-1)
    for call in (
        lambda: cg.qrelu_mlp(rows(3, 5), *weights), lambda: cg.qrelu_mlp(torch.tensor(1.0), *weights),
        lambda: cg.qrelu_mlp(x, first.weight, None, 0.3, first.weight),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError)):
            call()


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("build", [chain, gated])
def test_traced_by_torch_jit(build, bias):
    model, x = build(bias=bias).eval(), rows(6, 24)
    assert torch.equal(torch.jit.trace(model, x)(2 * x), model(2 * x))
