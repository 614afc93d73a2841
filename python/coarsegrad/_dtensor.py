"""DTensors: every process computes the staircase of its shard.

Implemented above autograd, because saved bits have the layout of a local tensor, which no placement describes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._torch_internals import make_contiguous_strides_for, suggest_memory_format

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # imported if any DTensor exists
    return module is not None and isinstance(x, module.DTensor)


def is_sharded(placement: Any, dim: int | None = None) -> bool:
    """Whether processes have different elements, along `dim` if given. Of torch's strided shards its own is_shard says
    no."""
    if placement.is_replicate() or placement.is_partial():
        return False
    return dim is None or placement.dim == dim


def on_shards(function: Callable[..., Tensor], x: DTensor, alpha: Tensor, channel_dim: int | None) -> DTensor:
    """function(x, alpha), elementwise in x and in x's memory format, on the local tensors.

    alpha: a DTensor, or a tensor that is the same in all processes. Each process uses the alphas of its channels. Their
    gradient is partial over the processes that share alphas but not elements.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = x.device_mesh
    placements = tuple(Replicate() if p.is_partial() else p for p in x.placements)
    x = x.redistribute(mesh, placements)
    by_channel = [channel_dim is not None and is_sharded(p, channel_dim % x.dim()) for p in placements]
    if any(by and type(p) is not Shard for by, p in zip(by_channel, placements)):
        raise NotImplementedError(f"alpha per channel takes no DTensor placed as {x.placements}")
    if not isinstance(alpha, DTensor):
        alpha = DTensor.from_local(alpha, mesh, [Replicate()] * mesh.ndim, run_check=False)
    alpha = alpha.redistribute(mesh, [Shard(0) if by else Replicate() for by in by_channel])
    shares = [Shard(0) if by else Partial() if is_sharded(p) else p for by, p in zip(by_channel, placements)]
    y = function(x.to_local(), alpha.to_local(grad_placements=shares))
    dense = x.is_contiguous(memory_format=suggest_memory_format(x))
    stride = x.stride() if dense else make_contiguous_strides_for(x.shape)
    return DTensor.from_local(y, mesh, placements, run_check=False, shape=x.shape, stride=tuple(stride))
