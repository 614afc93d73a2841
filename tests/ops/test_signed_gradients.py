"""Gradients of the signed staircase, what is saved for them, transforms of torch, packing, and bad input."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re

import oracle
import oracle_signed
import pytest
import torch
from saved_bytes import Kept
from torch import nn

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("reference_or_native")


def random_input(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(x, alpha, dy, bits, **settings):
    """(dx, dalpha), None for an alpha that is not learned."""
    x = x.detach().clone().requires_grad_()
    alpha = alpha.detach().clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    cg.qsigned(x, alpha, bits, **settings).backward(dy)
    return x.grad, alpha.grad if isinstance(alpha, torch.Tensor) else None


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_a_dynamic_alpha_passes_the_gradient(dtype):
    x, dy = random_input(4, 64, dtype=dtype), random_input(4, 64, dtype=dtype, seed=1)
    x[0, 0] = math.nan
    for ste in ("clipped", "identity"):
        assert torch.equal(gradients(x, None, dy, 4, group=32, ste=ste)[0], dy)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clipped_is_a_select_at_the_outer_levels(dtype, bits):
    p, alpha = 2 ** (bits - 1) - 1, 0.3
    top = oracle_signed.levels(torch.tensor([alpha], dtype=oracle.wide(dtype)), bits, dtype)[0, -1]
    x = torch.stack([top, oracle.up(top), oracle.down(top), -top, oracle.down(-top), oracle.up(-top)])
    x = torch.cat([x, torch.tensor([0, math.nan, math.inf, -math.inf], dtype=dtype)])
    dy = torch.full_like(x, math.inf)
    dx, _ = gradients(x, alpha, dy, bits)
    assert (dx == math.inf).tolist() == [True, False, True, True, False, True, True, True, False, False]
    assert not dx.isnan().any() and not dx[~dx.isinf()].any()
    assert torch.equal(gradients(x, alpha, dy, bits, ste="identity")[0], dy)
    assert p * alpha >= float(top) * 0.99


@pytest.mark.parametrize("ste", ["clipped", "identity"])
@pytest.mark.parametrize("rule", ["exact", "chain"])
@pytest.mark.parametrize("channel_dim", [None, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_learned_alpha(ste, rule, channel_dim, memory_format):
    for bits, dtype in ((2, torch.float32), (4, torch.bfloat16), (8, torch.float64)):
        x = random_input(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=memory_format)
        dy = random_input(2, 3, 4, 5, dtype=dtype, seed=1)
        p = 2 ** (bits - 1) - 1
        alpha = torch.tensor([0.8, 1.0, 1.3] if channel_dim else [1.0], dtype=oracle.wide(dtype)) / p
        dx, dalpha = gradients(x, alpha, dy, bits, ste=ste, alpha_grad=rule, channel_dim=channel_dim)
        rows, dy_rows = (oracle.to_rows(t, channel_dim) for t in (x, dy))
        k = oracle_signed.codes_of_rows(rows, alpha, bits).double() - p
        inside = rows.abs() <= oracle_signed.levels(alpha, bits, dtype)[:, -1:]
        u = rows.double() / alpha.double()[:, None]
        factor = k if rule == "exact" else k - (u * inside if ste == "clipped" else u)
        wanted = (dy_rows.double() * factor).sum(1)
        scale = (dy_rows.double() * factor).abs().sum(1).max() * torch.finfo(oracle.wide(dtype)).eps * 8
        torch.testing.assert_close(dalpha.double(), wanted, rtol=0, atol=float(scale))
        slope = inside if ste == "clipped" else torch.ones_like(inside)
        assert torch.equal(dx, torch.where(oracle.from_rows(slope, x, channel_dim), dy, 0))


def test_lsq_scales_by_the_elements_of_a_sample():
    x, dy, alpha = random_input(3, 8), random_input(3, 8, seed=1), torch.tensor([0.2])
    plain = gradients(x, alpha, dy, 4)[1]
    scaled = gradients(x, alpha, dy, 4, alpha_scale="lsq")[1]
    torch.testing.assert_close(scaled, plain / (8 * 7) ** 0.5)
    torch.testing.assert_close(gradients(x, alpha, dy, 4, alpha_scale=0.5)[1], plain * 0.5)


def test_the_second_derivative_of_a_fixed_alpha():
    x = random_input(8, 8).requires_grad_()
    for alpha in (0.2, None):
        y = cg.qsigned(x, alpha, 4)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
        inside = x.abs() <= 0.2 * 7 if alpha else torch.ones_like(x, dtype=torch.bool)
        assert torch.equal(second, torch.where(inside, 2.0, 0.0))


def test_no_second_derivative_of_a_learned_alpha():
    x, alpha = random_input(8).requires_grad_(), torch.tensor([0.2], requires_grad=True)
    y = cg.qsigned(x, alpha, 4)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(dx.sum(), x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        for block in (contextlib.nullcontext(), cg.packed_activations()):
            with pytest.raises(NotImplementedError, match="qsigned has no forward-mode"), block:
                cg.qsigned(dual, 0.2, 4)


def test_the_rotation_is_its_own_derivative():
    x, dy = random_input(2, 128).requires_grad_(), random_input(2, 128, seed=1)
    cg.hadamard(x, 64).backward(dy)
    assert torch.equal(x.grad, cg.hadamard(dy, 64))
    torch.autograd.gradcheck(lambda x: cg.hadamard(x, 4), random_input(2, 8, dtype=torch.float64).requires_grad_())


# ------------------------------------------------------------------------------------------------ what is saved


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes(bits, dtype):
    n, width = 64 * 64, oracle.CODE_WIDTH[bits]
    learned = torch.tensor([0.1], requires_grad=True)
    for alpha, settings, wanted in (
        (None, {"group": 32}, 0),
        (0.1, {"ste": "identity"}, 0),
        (0.1, {}, n // 8),
        (learned, {"ste": "identity"}, n * width // 8),
        (learned, {}, n * width // 8 + n // 8),
        (learned, {"alpha_grad": "chain"}, n * dtype.itemsize),
    ):
        x = random_input(64, 64, dtype=dtype).requires_grad_()
        with Kept(learned) as kept:
            y = cg.qsigned(x, alpha, bits, **settings)
        assert kept.bytes == wanted and y.requires_grad
    with Kept(learned) as kept:  # a gradient of alpha alone reads no mask
        y = cg.qsigned(random_input(64, 64, dtype=dtype), learned, bits)
    assert kept.bytes == n * width // 8 and y.requires_grad


def networks():
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, group=32), nn.Linear(64, 64))
    yield nn.Sequential(nn.Linear(64, 64), cg.QSigned(8, rotation=64), nn.Linear(64, 64))
    learned = {"alpha": 0.1, "learn_alpha": True}
    yield nn.Sequential(nn.Linear(64, 64), cg.QSigned(2, **learned), nn.Linear(64, 64))
    per_channel = {"alpha": torch.full((64,), 0.1), "num_channels": 64, "learn_alpha": True, "ste": "identity"}
    yield nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, **per_channel), nn.Linear(64, 64))
    yield nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, alpha=0.1, learn_alpha=True, alpha_grad="chain"), nn.Tanh())


def network_gradients(net, x, packed):
    net = copy.deepcopy(net)
    x = x.clone().requires_grad_()
    if packed:
        cg.pack_activations_(net)
    net(x).square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing_changes_no_gradient(dtype):
    x = random_input(32, 64, dtype=dtype)
    for net in networks():
        net = net.to(dtype)
        want, got = network_gradients(net, x, False), network_gradients(net, x, True)
        assert all(map(torch.equal, got, want)) and all(g.count_nonzero() for g in want)


def test_packed_bytes():
    """Codes, and 16 bits a group."""
    x = random_input(256, 64, dtype=torch.bfloat16)
    net = nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, group=32), nn.Linear(64, 64)).bfloat16()
    cg.pack_activations_(net)
    with Kept(x, *net.parameters()) as kept:
        y = net(x)
    assert kept.bytes == 256 * 64 // 2 + 256 * 2 * 2 and y.requires_grad


def test_layers_that_read_one_output_share_its_codes():
    x = random_input(256, 64).requires_grad_()
    layers = [nn.Linear(64, 64) for _ in range(3)]
    with Kept(x, *(p for layer in layers for p in layer.parameters())) as kept, cg.packed_activations():
        y = cg.qsigned(x, None, 8)
        out = sum(layer(y) for layer in layers)
    assert kept.bytes == 256 * 64 + 256 * 2 and out.requires_grad


def test_an_alpha_that_an_optimizer_changes_before_the_backward():
    layer, alpha, x = nn.Linear(64, 1, bias=False), torch.tensor([0.2], requires_grad=True), random_input(8, 64)
    wanted = cg.qsigned(x, alpha, 4).sum(0, keepdim=True)
    with cg.packed_activations():
        out = layer(cg.qsigned(x, alpha, 4))
    with torch.no_grad():
        alpha.mul_(2)
    out.sum().backward()
    torch.testing.assert_close(layer.weight.grad, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_keeps_the_codes_of_q_k_and_v(causal):
    q, k, v = (random_input(2, 4, 32, 16, seed=seed).requires_grad_() for seed in range(3))

    def attend():
        steps = [cg.qsigned(t, None, 8) for t in (q, k, v)]
        return nn.functional.scaled_dot_product_attention(*steps, is_causal=causal)

    want = torch.autograd.grad(attend().square().sum(), (q, k, v))
    with Kept(q, k, v) as kept, cg.packed_activations():
        out = attend()
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(map(torch.equal, got, want))
    n = 2 * 4 * 32 * 16
    # Beside the codes: the output, twice (of the square), and the sums of exponentials.
    assert kept.bytes <= 3 * (n + n // 16 * 2) + n * 4 + 2 * 4 * 32 * 4 + 1024


def test_nan_in_a_group_is_rebuilt():
    layer = nn.Linear(64, 1, bias=False)
    x = random_input(2, 64).requires_grad_()
    with torch.no_grad():
        x[0, 3] = math.nan
    with cg.packed_activations():
        out = layer(cg.qsigned(x, None, 4, group=32))
    out.sum().backward()
    assert layer.weight.grad[0, :32].isnan().all() and not layer.weight.grad[0, 32:].isnan().any()


# ------------------------------------------------------------------------------------------------ torch around it


def test_transforms_of_functions():
    x = random_input(5, 64)
    batched = torch.vmap(lambda row: cg.qsigned(row, None, 4, group=16))(x)
    assert torch.equal(batched, cg.qsigned(x, None, 4, group=16))
    assert torch.equal(torch.vmap(lambda row: cg.hadamard(row, 16), in_dims=1)(x.t()), cg.hadamard(x, 16))

    def loss(x, alpha):
        return cg.qsigned(x, alpha, 4, alpha_scale="lsq").square().sum()

    alpha = torch.tensor([0.2])
    wanted = gradients(x, alpha, 2 * cg.qsigned(x, alpha, 4), 4, alpha_scale="lsq")
    got = torch.func.grad(loss, argnums=(0, 1))(x, alpha)
    torch.testing.assert_close(got, wanted)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(x, alpha)
    torch.testing.assert_close(per_sample, wanted[0])
    rotated = torch.func.grad(lambda x: cg.hadamard(x, 16).square().sum())(x)
    torch.testing.assert_close(rotated, 2 * x)
    with pytest.raises(NotImplementedError, match="vmap over alpha"):
        torch.vmap(lambda a: cg.qsigned(x, a[None], 4))(torch.tensor([0.1, 0.2]))


def test_compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 64), cg.QSigned(4, group=32), nn.Linear(64, 64),
        cg.QSigned(4, alpha=0.1, learn_alpha=True, alpha_scale="lsq"), nn.Linear(64, 64), cg.QSigned(8, rotation=64),
    )  # fmt: skip

    def packed(x):
        with cg.packed_activations():
            return net(x)

    x = random_input(32, 64)

    def run(forward):
        net.zero_grad()
        given = x.clone().requires_grad_()
        forward(given).square().sum().backward()
        return [given.grad, *(p.grad.clone() for p in net.parameters())]

    plain = run(torch.compile(net, fullgraph=True))
    torch.testing.assert_close(plain, run(net))
    assert all(map(torch.equal, run(torch.compile(packed, fullgraph=True)), plain))
    graph = torch.compile(packed, fullgraph=True)
    with Kept(x, *net.parameters()) as kept:
        y = graph(x)
    alphas = 32 * 2 * 2
    assert kept.bytes == alphas + 32 * 64 // 2 + 32 * 64 // 8 + 32 * 64 // 2 and y.requires_grad  # no y


def test_export_and_reload():
    net = nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, group=32), cg.QSigned(4, alpha=0.1)).eval()
    x = random_input(4, 64)
    program = torch.export.export(net, (x,), dynamic_shapes={"input": {0: torch.export.Dim("batch")}})
    assert torch.equal(program.module()(x[:3]), net(x[:3]))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))
    other = nn.Sequential(nn.Linear(64, 64), cg.QSigned(4, group=32), cg.QSigned(4, alpha=0.5))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x)) and list(net.state_dict()) == ["0.weight", "0.bias", "2.alpha"]


def test_alpha_stays_wide():
    module = cg.QSigned(4, alpha=0.1, learn_alpha=True).half()
    assert module.alpha.dtype == torch.float32 and module(random_input(4, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(RuntimeError, match="alpha must be finite and > 0"):
        module.load_state_dict({"alpha": torch.tensor([-1.0])})


def test_nested():
    parts = [random_input(n, 64, seed=n) for n in (2, 5)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout).requires_grad_()
        y = cg.qsigned(x, None, 4, group=32)
        for got, part in zip(y.unbind(), parts):
            assert torch.equal(got, cg.qsigned(part, None, 4, group=32))
    with pytest.raises(ValueError, match="channel_dim must be None for a nested x, got 1"):
        cg.qsigned(x, torch.ones(64), 4, channel_dim=1)


def test_rotated_weights_undo_the_rotation():
    layer = nn.Linear(128, 16)
    x, weight = random_input(4, 128), layer.weight.detach().clone()
    wanted = layer(x)
    cg.rotate_weight_(layer, 64)
    torch.testing.assert_close(layer(cg.hadamard(x, 64)), wanted, rtol=1e-4, atol=1e-4)
    cg.rotate_weight_(layer, 64)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "kind, words, arguments",
    [
        (TypeError, "x must be a Tensor, got list", {"x": [1.0]}),
        (TypeError, "x must be of a dtype.*got torch.int64", {"x": torch.arange(4)}),
        (ValueError, "bits must be an int in 2..8.*got 1", {"bits": 1}),
        (ValueError, "bits must be an int in 1..8, got 9", {"bits": 9}),
        (TypeError, "bits must be an int.*got 4.0", {"bits": 4.0}),
        (ValueError, "group must be >= 1 and divide x's last dimension, 64, got 48", {"group": 48}),
        (ValueError, "group must be >= 1.*got 0", {"group": 0}),
        (TypeError, "group must be an int, got 32.0", {"group": 32.0}),
        (ValueError, "group must be None if alpha is given, got 32", {"alpha": 0.1, "group": 32}),
        (ValueError, "channel_dim must be None for a dynamic alpha, got 0", {"channel_dim": 0}),
        (ValueError, "x must have at least one dimension for a dynamic alpha", {"x": torch.tensor(1.0)}),
        (ValueError, "alpha must be finite and > 0, got -1", {"alpha": -1}),
        (ValueError, "alpha must be finite and (> 0|positive).*got 0", {"alpha": torch.zeros(1)}),
        (ValueError, r"alpha must have shape \[1\].*got \[2\]", {"alpha": torch.ones(2)}),
        (ValueError, r"alpha must have shape \[64\].*got \[2\]", {"alpha": torch.ones(2), "channel_dim": 1}),
        (ValueError, "unknown ste 'relu', must be one of 'clipped', 'identity'", {"ste": "relu"}),
        (ValueError, "unknown alpha_grad 'two_valued', must be one of 'exact', 'chain'", {"alpha_grad": "two_valued"}),
        (ValueError, "alpha_scale must be finite.*got nan", {"alpha": 0.1, "alpha_scale": math.nan}),
    ],
)
def test_bad_arguments(kind, words, arguments):
    given = {"x": random_input(2, 64), "alpha": None, "bits": 4, **arguments}
    with pytest.raises(kind) as error:
        cg.qsigned(given.pop("x"), given.pop("alpha"), **given)
    assert re.search(words, str(error.value)), error.value


def test_bad_rotations_modules_and_codes():
    x = random_input(2, 96)
    for size, words in ((64, "divide x's last dimension, 96, got 64"), (48, "a power of two, got 48")):
        with pytest.raises(ValueError, match=words):
            cg.hadamard(x, size)
    with pytest.raises(TypeError, match="size must be an int, got 8.0"):
        cg.hadamard(x, 8.0)
    with pytest.raises(ValueError, match="size must be >= 1 and divide"):
        cg.rotate_weight_(nn.Linear(96, 2), 64)
    with pytest.raises(TypeError, match="layer must be an nn.Linear, got Conv2d"):
        cg.rotate_weight_(nn.Conv2d(1, 1, 1), 64)
    for arguments, words in (
        ({"learn_alpha": True}, "alpha must be given"),
        ({"rotation": 48}, "a power of two, got 48"),
        ({"num_channels": 0}, "num_channels must be None or an int >= 1"),
        ({"bits": 1}, "bits must be an int in 2..8"),
        ({"alpha": 0.1, "group": 4}, "group must be None if alpha is given"),
        ({"alpha_scale": math.inf}, "alpha_scale must be finite"),
    ):
        with pytest.raises(ValueError, match=words):
            cg.QSigned(**arguments)
    codes, alpha = cg.qsigned_codes(random_input(2, 64), None, 4, group=32)
    with pytest.raises(ValueError, match=r"alpha must have shape \[2, n / group\] with n = 64, got \[1, 2\]"):
        cg.dequantize(codes, alpha[:1], 4, (2, 64), torch.float32, signed=True)
    with pytest.raises(ValueError, match="codes must have 64 bytes"):
        cg.dequantize(codes[1:], alpha, 4, (2, 64), torch.float32, signed=True)
