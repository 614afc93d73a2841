"""Converted models in two processes (gloo, CPU): calibration, DDP and FSDP2 come to what one process comes to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformer_models import built, opt

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")

WORLD, STEPS = 2, 4
IDS = torch.randint(4, 64, (8, 12), generator=torch.Generator().manual_seed(1))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.wo(F.relu(self.wi(x)))


def converted(make):
    model, _ = built(make)
    report = cg.quantize_(model, 4, ste="relu", learn_alpha=True, alpha_scale="lsq", alpha=0.01)
    cg.pack_activations_(model)
    return model, report


def feed_forward():
    return nn.Sequential(nn.Embedding(64, 16), FeedForward(), FeedForward(), nn.Linear(16, 64)), None


def opt_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def feed_forward_loss(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten())


CASES = {"opt": (opt, opt_loss), "rewritten": (feed_forward, feed_forward_loss)}


def train(model, loss_of, ids):
    """The losses; the last step would make every alpha negative, and halves it."""
    groups = cg.param_groups(model, lr=0.1, weight_decay=0.01, alpha_lr=0.01)
    optimizer = cg.keep_positive(torch.optim.SGD(groups, momentum=0.9), model)
    losses = []
    for i in range(STEPS):
        loss = loss_of(model, ids)
        losses.append(loss.detach())
        loss.backward()
        if i == STEPS - 1:
            alphas = groups[1]["params"]
            before = [alpha.detach().clone() for alpha in alphas]
            for alpha in alphas:
                alpha.grad.fill_(1e6)
        optimizer.step()
        optimizer.zero_grad()
    assert len(alphas) == 2 and all((alpha == half / 2).all() for alpha, half in zip(alphas, before))
    return torch.stack(losses)


def trained(wrap, case, ids):
    make, loss_of = CASES[case]
    model, report = converted(make)
    wrapped = wrap(model)
    losses = train(wrapped, loss_of, ids)
    return losses, wrapped, report


def shard(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.decoder.layers if hasattr(model, "model") else model[1:3]:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mean(losses):
    dist.all_reduce(losses)
    return losses / WORLD


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def in_each_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    mine = IDS.chunk(WORLD)[rank]
    found = {}
    model, _ = converted(opt)
    cg.calibrate(model, [{"input_ids": ids} for ids in mine.split(2)], progress=False)
    found["alphas"] = alphas_of(model)
    for case in CASES:
        losses, ddp, _ = trained(DistributedDataParallel, case, mine)
        found[case, "ddp"] = mean(losses), ddp.module.state_dict()
        losses, fsdp, report = trained(shard, case, mine)
        found[case, "fsdp"] = mean(losses), whole(fsdp)
        if case == "rewritten":
            with pytest.raises(RuntimeError, match="FSDPFeedForward: undo what changed its class first"):
                report.undo()
            found["reprs"] = [repr(layer) for layer in qrelus(fsdp)]
    for own_groups in (False, True):
        found["bfloat16", own_groups] = in_bfloat16(own_groups, mine)
    found["meta"] = from_meta()
    found["checkpoint"] = through_a_checkpoint(folder)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def qrelus(model):
    return [m for m in model.modules() if isinstance(m, cg.QReLU)]


def in_bfloat16(own_groups, ids):
    """The policy rounds a learned alpha, and with it the levels; not one of a QReLU that is a group of its own."""
    model, _ = converted(opt)
    mesh, seen = init_device_mesh("cpu", (WORLD,)), set()
    for layer in qrelus(model):
        layer.register_forward_hook(lambda layer, args, y: seen.add((args[0].dtype, layer.alpha.dtype, y.dtype)))
        if own_groups:
            fully_shard(layer, mesh=mesh)
    half = fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    return mean(train(half, opt_loss, ids)), whole(half), seen


def from_meta():
    """Deferred initialisation: made and sharded without memory, then reset_parameters."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), cg.QReLU(2, learn_alpha=True, num_channels=8), cg.QReLU(2, alpha=0.3))
    model = fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model(torch.ones(2, 8)).sum().backward()
    return {name: t for name, t in whole(model).items() if name.endswith("alpha")}


def through_a_checkpoint(folder):
    """Saved and loaded by torch.distributed.checkpoint; what an alpha is for is checked."""

    def made(bits=2, **settings):
        model = nn.Sequential(nn.Linear(8, 8), cg.QReLU(bits, learn_alpha=True, alpha=0.3, **settings))
        return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))

    def load(model):
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        set_model_state_dict(model, state)
        return whole(model)

    model = made()
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/checkpoint")
    want, got = whole(model), load(made())
    with pytest.raises(RuntimeError, match="1.alpha: got the alpha of a QReLU with bits=2, wanted one with bits=3"):
        load(made(3))
    full = StateDictOptions(full_state_dict=True)
    with pytest.raises(RuntimeError, match=r"1.alpha: .* from \[1\] to \[8\] as a DTensor; do it before sharding"):
        set_model_state_dict(model, whole(made(num_channels=8)), options=full)
    return want, got


def alphas_of(model):
    return {name: m.alpha.detach().clone() for name, m in model.named_modules() if isinstance(m, cg.QReLU)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(in_each_process, (folder,), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_calibrate(found):
    model, _ = converted(opt)
    before = alphas_of(model)
    cg.calibrate(model, [{"input_ids": IDS}], progress=False)
    want = alphas_of(model)
    assert want.keys() == found[0]["alphas"].keys() and want
    for name in want:
        assert torch.equal(found[0]["alphas"][name], want[name]) and torch.equal(found[1]["alphas"][name], want[name])
        assert not torch.equal(want[name], before[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training(found, case, how):
    losses, model, _ = trained(lambda model: model, case, IDS)
    want = model.state_dict()
    assert losses[-1] < losses[0]
    for got_losses, got in (process[case, how] for process in found if process[case, how][1]):
        torch.testing.assert_close(got_losses, losses, rtol=1e-4, atol=0)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("own_groups", [False, True])
def test_fsdp_in_bfloat16(found, own_groups):
    losses, model, _ = trained(lambda model: model, "opt", IDS)
    got_losses, got, seen = found[0]["bfloat16", own_groups]
    assert seen == {(torch.bfloat16, torch.float32 if own_groups else torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(got_losses, losses, rtol=0.02, atol=0)
    for name, alpha in alphas_of(model).items():
        torch.testing.assert_close(got[f"{name}.alpha"], alpha, rtol=0.02, atol=0)


def test_deferred_initialisation(found):
    default = cg.QReLU(2).alpha
    assert torch.equal(found[0]["meta"]["1.alpha"], default.expand(8))
    assert all(torch.equal(process["meta"]["2.alpha"], torch.tensor([0.3])) for process in found)


def test_a_distributed_checkpoint(found):
    want, got = found[0]["checkpoint"]
    assert list(got) == ["0.weight", "0.bias", "1.alpha", "1._extra_state"]
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_sharded_alphas_are_printed_without_their_value(found):
    for process in found:
        assert len(process["reprs"]) == 2
        assert all("learn_alpha=True" in text and ", alpha=" not in text for text in process["reprs"])
