"""The processes of a command under torchrun: which this is, its share of the work, and what they do together.

Without torchrun there is one process, number 0, and every function here is trivial.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._dtensor import is_dtensor
from .arguments import usable_device
from .files import ExperimentError

MODES = ("ddp", "fsdp")


def launched() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def rank() -> int:
    """The number of this process, 0, 1, ..."""
    return dist.get_rank() if _joined() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


# ------------------------------------------------------------------------------------- start and end


@contextlib.contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the other processes for the block, and give the device of this one: the one named, or its own GPU.

    Only process 0 prints. An exception in one process ends all of them: it is raised in the first, and the others exit
    with status 1 and no message, whatever they then fail at.
    """
    if not launched():
        yield usable_device(device)
        return
    store, number, total = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        own = _own_device(device)
        backend = {"backend": "nccl", "device_id": own} if own.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**backend, store=store, rank=number, world_size=total)
        with _quiet() if number else contextlib.nullcontext():
            yield own
    except BaseException:
        atexit.register(exit_at_once)
        if not _is_first(store):
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def exit_at_once() -> None:
    """The end of a process that failed: without taking the group apart, which the others still use."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _own_device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ExperimentError(f"--device must be cpu or cuda under torchrun, which numbers the GPUs, got {name}")
    device = usable_device(name if name == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _is_first(store: dist.Store) -> bool:
    """Whether this process is the first to fail. True as well if the store is gone, with the process that kept it."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:
        return True


# ------------------------------------------------------------------------------------------ together


def wait() -> None:
    """Wait until all processes are here."""
    if _joined():
        dist.barrier()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """First one process of each machine runs the block, then the others: they find what it has downloaded."""
    later = _joined() and os.environ["LOCAL_RANK"] != "0"
    if later:
        wait()
    yield
    if not later:
        wait()


def share(batch: Tensor) -> Tensor:
    """This process's rows of a batch; all of them if they cannot be shared evenly.

    Either way the mean over rows, averaged over the processes, is that of the batch.
    """
    return batch if len(batch) % count() else batch.chunk(count())[rank()]


def mean(value: Tensor) -> Tensor:
    """The mean of `value` over the processes, the same bits in all of them."""
    if not _joined():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / count()


# -------------------------------------------------------------------------------------------- models


def parallel(model: nn.Module, mode: str | None, loss_of: Callable[[nn.Module], Tensor]) -> nn.Module:
    """What to train in place of `model`, which is the same in all processes. None: the model itself.

    "ddp" keeps all of it in every process. "fsdp" shards it in place: each layer is gathered while it is in use.
    loss_of(what to train): a loss of any batch.
    """
    if mode is None:
        return model
    if mode == "ddp":
        replica = nn.parallel.DistributedDataParallel(model)
        # It rearranges what it sums after its first backward, and then sums in another order. If that were a step of
        # training, a run that is resumed would differ from there.
        loss_of(replica).backward()
        replica.zero_grad()
        return replica
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (count(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost ModuleLists: in a language model, its blocks."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _layers(child)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `parallel` returned; under FSDP it is the same, sharded."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def local(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A model like the one that `parallel` was given, with the weights of the one that it returned.

    make: makes it anew, because FSDP has sharded the first; not called otherwise.
    """
    model = unwrapped(model)
    state = model.state_dict()
    if not any(map(is_dtensor, state.values())):
        return model
    new = make()
    new.load_state_dict(whole(state, everywhere=True))
    return new


def whole(state: dict, everywhere: bool = False) -> dict:
    """A state_dict with its shards gathered on the CPU, everywhere or in process 0, and None in others."""
    if not _joined():
        return state

    def gathered(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: gathered(item) for name, item in value.items()}
        if not is_dtensor(value):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if everywhere or rank() == 0 else None

    return gathered(state)


def load(part: Any, state: dict) -> None:
    """part.load_state_dict, of what `whole` returned: a part with shards takes its own."""
    if isinstance(part, nn.Module):
        now = part.state_dict()
        state = {name: _shard(value, now.get(name)) for name, value in state.items()}
    elif isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        moments = {
            number: {name: _shard(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        state = {**state, "state": moments}
    part.load_state_dict(state)


def _shard(value: Any, like: Any) -> Any:
    """`value` as `like` is sharded; itself if that is not, or has another shape, as an optimizer's count of steps."""
    if not is_dtensor(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
