"""Quantized weights in two processes (gloo, CPU): blended steps under DDP and FSDP2 are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import coarsegrad as cg

WORLD, STEPS, RHO = 2, 3, 0.25  # a blend that a test sees
X = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1))


def made():
    """Scales along the dimension that is sharded; along another one, whose channels are split; and of groups."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 5, 3), nn.ReLU(), nn.ConvTranspose1d(5, 6, 3), nn.ReLU(),
        nn.ConvTranspose1d(6, 6, 1, groups=2), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    cg.quantize_(model, 4, weight_bits=2, weight_ste="trust")
    cg.pack_activations_(model)
    return model


def trained(wrap, x):
    model = wrap(made())
    optimizer = cg.blended(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, RHO)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def shard(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_each_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mine = X.chunk(WORLD)[rank]
    sharded = trained(shard, mine)
    held = [p for name, p in sharded.named_parameters() if name.endswith("original")]
    assert len(held) == 4 and all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in held)
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    torch.save(
        {"ddp": trained(DistributedDataParallel, mine).module.state_dict(), "fsdp": whole}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(in_each_process, (folder,), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_blended_steps(found, how):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    want = trained(lambda model: model, X).state_dict()
    torch.set_num_threads(threads)
    for got in (process[how] for process in found if process[how]):
        assert got.keys() == want.keys()
        for name, t in want.items():
            torch.testing.assert_close(got[name], t, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)
