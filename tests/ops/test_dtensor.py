"""DTensors in two processes (gloo, CPU): outputs and gradients are those of one process, to the bit where no sum of
several processes is in them."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import coarsegrad as cg

WORLD = 2
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))  # 5 rows: shards of 3 and 2
DY = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
ONE, CHANNELS = torch.tensor([0.3]), torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.1
PLACED = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate(), "sums": Partial()}
SETTINGS = {
    "fixed": {},
    "exact": {"alpha_grad": "exact"},
    "lsq": {"alpha_grad": "chain", "alpha_scale": "lsq"},
    "own": {"ste": "reverse_exponential_step"},
    "channels": {"channel_dim": -1, "alpha_grad": "exact"},
    "in place": {"inplace": True},
}


WEIGHT = torch.randn(4, 8, generator=torch.Generator().manual_seed(4))
OUT = torch.randn(5, 4, generator=torch.Generator().manual_seed(5))
IMAGES = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(6)).to(memory_format=torch.channels_last)
SIGNED = {
    "dynamic": (None, {"group": 4}),
    "learned": (ONE, {"alpha_scale": "lsq"}),
    "channels": (CHANNELS, {"channel_dim": 1, "alpha_grad": "chain"}),
}


def alpha_of(case):
    return (CHANNELS if case == "channels" else ONE).clone().requires_grad_(case != "fixed")


def gradients(y, x, alpha, dy):
    return torch.autograd.grad(y, [x, *([alpha] if alpha.requires_grad else [])], dy)


def whole(t):
    return t.full_tensor().clone() if isinstance(t, DTensor) else t


def network(squared=False):
    torch.manual_seed(3)
    activation = cg.QReLU(2, alpha=0.3, learn_alpha=True, alpha_grad="exact", squared=squared)
    return nn.Sequential(nn.Linear(8, 6), activation, nn.Linear(6, 8))


def step(model, x):
    y = model(x)
    y.backward(DY if not isinstance(y, DTensor) else distribute_tensor(DY, y.device_mesh, y.placements))
    return [whole(t).detach() for t in (y, *(p.grad for p in model.parameters()))]


def in_each_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for case, settings in SETTINGS.items():
        for where, placement in PLACED.items():
            for spread in (False, True):
                if where == "sums":
                    x = DTensor.from_local(X * (0.25 + rank / 2), mesh, [Partial()])  # a quarter, and three
                else:
                    x = distribute_tensor(X, mesh, [placement])
                x.requires_grad_()
                alpha = alpha_of(case)
                if spread:
                    alpha = distribute_tensor(alpha.detach(), mesh, [Replicate()]).requires_grad_(alpha.requires_grad)
                if (case, where) == ("in place", "sums"):
                    with pytest.raises(NotImplementedError, match="takes no DTensor of partial sums"):
                        cg.qrelu(x * 1, alpha, 2, **settings)
                    continue
                y = cg.qrelu(x * 1, alpha, 2, **settings)
                assert y.placements == (Replicate() if where == "sums" else placement,)
                grads = gradients(y, x, alpha, distribute_tensor(DY, mesh, [Shard(1)]))
                found[case, where, spread] = [whole(t).detach() for t in (y, *grads)]
    plan = {
        "0": ColwiseParallel(use_local_output=False),
        "1": None,
        "2": RowwiseParallel(input_layouts=Shard(-1), use_local_output=False),
    }
    for name, packing in (("plain", None), ("packed", cg.pack_activations_)):
        model = network(squared=name == "packed")
        model = parallelize_module(model, mesh, {key: style for key, style in plan.items() if style})
        if packing:
            packing(model)
        found[name] = step(model, X)
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        cg.qrelu_codes(distribute_tensor(X, mesh, [Shard(0)]), ONE, 2)
    with pytest.raises(ValueError, match=r"alpha must have shape \[1\]"):
        cg.qrelu(distribute_tensor(X, mesh, [Shard(0)]), torch.ones(2), 2)
    local = X[:, 4 * rank : 4 * rank + 4].contiguous()
    strided = DTensor.from_local(local, mesh, [_StridedShard(1, split_factor=2)], run_check=False)
    for staircase in (cg.qrelu, cg.qsigned):
        with pytest.raises(NotImplementedError, match="alpha per channel takes no DTensor placed as"):
            staircase(strided, CHANNELS, 2, channel_dim=1)
    with pytest.raises(NotImplementedError, match="needs whole rows, got a DTensor placed as"):
        cg.qsigned(strided, None, 4)
    alpha = ONE.clone().requires_grad_()
    y = cg.qrelu(strided, alpha, 2, alpha_grad="exact")
    y.to_local().sum().backward()
    found["strided"] = [whole(alpha.grad)]
    fused = cg.nn.QReLULinear(cg.QReLU(2, alpha=0.3), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        fused.layer.weight.copy_(DY[:4])
    fused.layer.weight = nn.Parameter(distribute_tensor(fused.layer.weight.detach(), mesh, [Replicate()]))
    found["fused"] = [whole(fused(distribute_tensor(X, mesh, [Shard(0)]))).detach()]
    for case, (alpha, settings) in SIGNED.items():
        for where, placement in PLACED.items():
            x = distribute_tensor(X, mesh, [placement]).requires_grad_()
            if alpha is None and where == "columns":
                with pytest.raises(NotImplementedError, match="needs whole rows, got a DTensor placed as"):
                    cg.qsigned(x, alpha, 4, **settings)
                continue
            given = alpha if alpha is None else alpha.clone().requires_grad_()
            weight = distribute_tensor(WEIGHT, mesh, [Replicate()]).requires_grad_()
            with cg.packed_activations() if where == "rows" else contextlib.nullcontext():
                y = cg.qsigned(x, given, 4, **settings)
                out = nn.functional.linear(y, weight)
            assert y.placements == (Replicate() if where == "sums" else placement,)
            wanted = [t for t in (x, weight, given) if t is not None]
            grads = torch.autograd.grad(out, wanted, distribute_tensor(OUT, mesh, [Replicate()]))
            found["signed", case, where] = [whole(t).detach() for t in (y, *grads)]
    images = distribute_tensor(IMAGES, mesh, [Shard(0)])
    y = cg.qsigned(images, None, 4, group=3)
    found["images"] = [whole(y), torch.tensor(y.stride()), torch.tensor(y.to_local().stride())]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensor")
    mp.spawn(in_each_process, (folder,), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case, where", [(c, w) for c in SETTINGS for w in PLACED if (c, w) != ("in place", "sums")])
def test_outputs_and_gradients(found, case, where):
    x, alpha = X.clone().requires_grad_(), alpha_of(case)
    y = cg.qrelu(x * 1, alpha, 2, **SETTINGS[case])
    want = [y, *gradients(y, x, alpha, DY)]
    for process in found:
        for spread in (False, True):
            got = process[case, where, spread]
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            for grad, wanted in zip(got[2:], want[2:], strict=True):
                torch.testing.assert_close(grad, wanted)


def test_alphas_gradient_is_summed_over_strided_shards(found):
    alpha = ONE.clone().requires_grad_()
    cg.qrelu(X, alpha, 2, alpha_grad="exact").sum().backward()
    for process in found:
        torch.testing.assert_close(process["strided"][0], alpha.grad)


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_tensor_parallel(found, name):
    for process in found:
        for got, want in zip(process[name], step(network(squared=name == "packed"), X), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case, where", [(c, w) for c in SIGNED for w in PLACED if (c, w) != ("dynamic", "columns")])
def test_the_signed_staircase(found, case, where):
    alpha, settings = SIGNED[case]
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    given = alpha if alpha is None else alpha.clone().requires_grad_()
    y = cg.qsigned(x, given, 4, **settings)
    wanted = torch.autograd.grad(nn.functional.linear(y, weight), [t for t in (x, weight, given) if t is not None], OUT)
    for process in found:
        got = process["signed", case, where]
        assert torch.equal(got[0], y)
        for grad, want in zip(got[1:], wanted, strict=True):
            torch.testing.assert_close(grad, want)


def test_groups_of_images_are_contiguous(found):
    """In the DTensor as in its shards."""
    for process in found:
        y, stride, local_stride = process["images"]
        assert torch.equal(y, cg.qsigned(IMAGES, None, 4, group=3))
        assert stride.tolist() == local_stride.tolist() == [120, 30, 6, 1]


def test_the_fused_linear(found):
    for process in found:
        torch.testing.assert_close(process["fused"][0], cg.qrelu_linear(X, 0.3, DY[:4], bits=2))
