"""Modules, packing and training on a GPU."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from gpu_backends import any_device, gpu
from packing_cases import CASES, assert_same, build, gradients, kept_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformer_models import opt

import coarsegrad as cg
from coarsegrad.experiments import training
from coarsegrad.experiments.data import Split
from coarsegrad.experiments.models import lenet5, quantized

by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _other_kernels_are_deterministic(monkeypatch):
    """What is compared to the bit must not depend on the order in which torch's own kernels add."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@any_device
@by_dtype
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", [{"ste": "relu"}, {}, {"learn_alpha": True}], ids=["relu", "clipped", "learned"])
def test_packing_changes_no_gradient(device, dtype, case, settings):
    model, x = build(case, dtype, **settings)
    model, x = model.to(device), x.to(device).detach().requires_grad_(x.is_floating_point())
    want = gradients(model, x)
    parameters = [*model.parameters(), *model.buffers()]
    plain, _ = kept_bytes(lambda: model(x), x, *parameters)
    cg.pack_activations_(model)
    packed, _ = kept_bytes(lambda: model(x), x, *parameters)
    assert packed < plain
    assert_same(gradients(model, x), want)


@any_device
def test_what_is_kept(device):
    """2-bit codes, and a bit an element where the gate is that of clipped_relu: as on a CPU."""
    for ste, bits in (("relu", 2), ("clipped_relu", 3)):
        rows, hidden = 64, 128
        model = nn.Sequential(nn.Linear(32, hidden), cg.QReLU(2, ste=ste), nn.Linear(hidden, 8)).to(device)
        x = torch.randn(rows, 32, device=device)
        cg.pack_activations_(model)
        kept, _ = kept_bytes(lambda: model(x), x, *model.parameters(), *model.buffers())
        assert 0 <= kept - rows * hidden * bits // 8 <= 16, (ste, kept)  # alpha beside


@any_device
def test_checkpoint_and_autocast(device):
    model, x = build("opt", ste="relu")
    model, x = model.to(device), x.to(device)
    cg.pack_activations_(model)
    grads = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = forward(x).float().square().mean()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads)) and all(g.isfinite().all() and g.any() for g in grads[0][:3])


@gpu
def test_compile_a_packed_model(device):
    model, x = build("mlp", ste="relu", learn_alpha=True)
    model, x = model.to(device), x.detach().to(device).requires_grad_()
    cg.pack_activations_(model)
    want = gradients(model, x)
    got = {name.removeprefix("_orig_mod."): value for name, value in gradients(torch.compile(model), x).items()}
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-4), name


@gpu
def test_float16_with_a_scaler(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), cg.QReLU(2, learn_alpha=True), nn.Linear(64, 4)).to(device)
    optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(model, 0.05, alpha_lr=1e-3)), model)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    x, losses = torch.randn(256, 16, device=device), []
    for _ in range(30):
        with torch.autocast(device, torch.float16):
            loss = (model(x).float() - x[:, :4]).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@any_device
def test_dropout_of_its_own(device):
    layer = cg.QReLU(2, alpha=0.5, ste="relu", dropout=0.25).to(device)
    x = torch.full((1 << 16,), 0.6, device=device, requires_grad=True)
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert abs((y == 0).float().mean().item() - 0.25) < 0.02
    level = y.detach().max()
    assert ((y == 0) | (y == level)).all() and abs(level.item() - 1.0 / 0.75) < 1e-6
    assert torch.equal(x.grad != 0, y != 0)


@any_device
def test_an_own_ste(device):
    with cg.register_ste("own", lambda u, top: 1 / (1 + u * u), needs="x"):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        grads = []
        for on in ("cpu", device):
            leaf, alpha = x.to(on).requires_grad_(), torch.tensor([0.4], device=on, requires_grad=True)
            y = cg.qrelu(leaf, alpha, 2, ste="own")
            grads.append([y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y.sum(), (leaf, alpha)))])
    (y, dx, dalpha), (want_y, want_dx, want_dalpha) = grads
    assert torch.equal(y, want_y)
    assert torch.allclose(dx, want_dx, rtol=1e-6) and torch.allclose(dalpha, want_dalpha, rtol=1e-4)


@any_device
def test_fsdp_in_one_process(device):
    torch.manual_seed(0)
    model, batch = opt()
    batch = {name: value.to(device) for name, value in batch.items()}
    cg.quantize_(model, 4, ste="relu", learn_alpha=True, alpha_scale="lsq", alpha=0.01)
    model = model.to(device)
    cg.pack_activations_(model)
    twin = copy.deepcopy(model)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(twin, mesh=init_device_mesh(device, (1,)))
        losses = []
        for wrapped in (model, twin):
            optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(wrapped, 0.1, alpha_lr=0.001)), wrapped)
            found = []
            for _ in range(3):
                loss = wrapped(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            losses.append(found)
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0]
    finally:
        dist.destroy_process_group()


def small_training(device):
    """(a model with learned alphas, the arguments of training.fit after it): three epochs, two rates."""
    torch.manual_seed(0)
    split = Split(torch.randn(160, 1, 28, 28), torch.randint(10, (160,))).to(torch.device(device))
    config = {"phase": "p", "epochs": 3, "lr": 0.05, "lr_drops": [2], "batch_size": 16, "seed": 0}
    return quantized(lenet5(nn.ReLU), 2, "clipped_relu", "ceil", "exact").to(device), (split, split, config)


def trained(model, arguments, checkpoint):
    history = training.fit(model, *arguments, checkpoint)
    return model.state_dict(), [{**row, "seconds": 0} for row in history]


def assert_trained_alike(one, other):
    assert one[1] == other[1]
    for name, value in other[0].items():
        assert torch.equal(one[0][name], value), name


@gpu
def test_a_captured_training_step_is_the_eager_one(device, monkeypatch, tmp_path):
    """The eager ones are those before a capture, here all."""
    start, arguments = small_training(device)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    found = []
    for warm_up in (3, 10**9):
        monkeypatch.setattr(training, "_WARM_UP_STEPS", warm_up)
        found.append(trained(copy.deepcopy(start), arguments, tmp_path / f"{warm_up}.pt"))
    assert len(replays) == 3 * 10 - 2 * 3 and len(set(map(id, replays))) == 2
    assert_trained_alike(*found)


@any_device
def test_trainings_at_once(device, tmp_path):
    start, arguments = small_training(device)
    alone = trained(copy.deepcopy(start), arguments, tmp_path / "alone.pt")
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(trained, copy.deepcopy(start), arguments, tmp_path / f"{i}.pt") for i in range(8)]
    for other in others:
        assert_trained_alike(other.result(), alone)
