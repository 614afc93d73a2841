"""Every private torch API that this package uses. Where a torch release breaks something, look here first.

torch has no public form of these: what autograd kernels written in Python need, dispatch keys, saved-tensor hooks, the
structure of nested tensors.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch._prims_common import make_contiguous_strides_for, suggest_memory_format
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.utils._python_dispatch import _disable_current_modes as no_dispatch_modes
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "MODULE_CALL_CODES",
    "SUPPORTED_NODES",
    "FakeTensor",
    "Hooks",
    "OpOverload",
    "apply_in_kernel",
    "below_autograd",
    "below_autograd_with_derivatives",
    "components",
    "dispatch_key",
    "functorch_active",
    "has_hooks",
    "has_kernel",
    "has_tangent",
    "in_functorch_kernel",
    "install_joint_graph_pass",
    "is_recomputed",
    "is_tangent",
    "keep_in_backward",
    "make_contiguous_strides_for",
    "metadata_of",
    "nested_like",
    "no_dispatch_modes",
    "quiet_onnx_exporter",
    "raw_saved",
    "redispatch_below_views",
    "saved_scalar",
    "saved_tensor_hooks",
    "set_preserved",
    "storage_id",
    "suggest_memory_format",
    "tag_compile_caches",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unregister",
    "unsafe_view",
    "view_root",
    "without_tracer",
]

# --------------------------------------------------------------------------------------- dispatch


def dispatch_key(device_type: str) -> str:
    """The dispatch key of the kernels of a device type, such as "CUDA" for "cuda"."""
    return torch._C._dispatch_key_for_device(device_type)


def has_kernel(op: str, device_type: str) -> bool:
    """Whether an op of coarsegrad has a kernel of its own for a device type, besides its default one."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"coarsegrad::{op}", dispatch_key(device_type))


def unregister(library: torch.library.Library) -> None:
    """Remove all that a library registered."""
    library._destroy()


def below_autograd() -> AbstractContextManager:
    """Ops called inside skip their Autograd kernels."""
    return torch._C._AutoDispatchBelowAutograd()


def below_autograd_with_derivatives(op: OpOverload, *args):
    """Call op below its own Autograd kernel, which is the caller. Outer functorch transforms can still differentiate
    the call, even where an autograd.Function's forward has disabled gradients."""
    with below_autograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op(*args)


def redispatch_below_views(op: OpOverload, keyset: torch._C.DispatchKeySet, *args):
    """Call op below its ADInplaceOrView kernel, which is the caller, with the keyset that kernel was given."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


# --------------------------------------------------------------------------------------- functorch


def functorch_active() -> bool:
    """Whether the caller runs under a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def in_functorch_kernel() -> bool:
    """Whether a transform of torch.func runs the calling Autograd kernel. Ops called below that kernel then reach the
    outer transforms, each with an Autograd kernel of its own."""
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.FuncTorchDynamicLayerBackMode)


def apply_in_kernel(function: type[torch.autograd.Function], *args):
    """function.apply for an Autograd kernel, for the transform of torch.func that runs it alone."""
    if not in_functorch_kernel():
        return function.apply(*args)
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


# --------------------------------------------------------------------------------------- autograd

Hooks = tuple[Callable[[Tensor], object], Callable[[object], Tensor]]


def saved_tensor_hooks() -> Hooks | None:
    """The innermost saved-tensor hooks, (pack, unpack), or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def raw_saved(node: Node, name: str) -> object:
    """What saved-tensor hooks returned for a tensor saved by a node; None if it was freed or is unknown."""
    try:
        return getattr(getattr(node, f"_raw_saved_{name}"), "data", None)
    except RuntimeError:
        return None


def saved_scalar(node: Node, name: str) -> object:
    """A number saved by a node, such as the exponent of a power."""
    return getattr(node, f"_saved_{name}")


def metadata_of(node: Node) -> dict[str, Any]:
    """A node's metadata, which lives as long as the node."""
    metadata: Any = node.metadata  # a property that torch declares as a method
    return metadata


def has_tangent(t: Tensor) -> bool:
    """Whether t carries a forward-mode derivative."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


# --------------------------------------------------------------------------------------- modules

# The code of the frames between a module's caller and its forward.
MODULE_CALL_CODES = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def has_hooks(module: nn.Module) -> bool:
    """Whether a forward or backward of the module runs hooks."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(hooks)


# --------------------------------------------------------------------------------------- graphs

JointGraphPass = Callable[..., torch.fx.GraphModule]


def install_joint_graph_pass(own: JointGraphPass) -> None:
    """Have AOTAutograd call a pass on each joint graph of forward and backward, after the user's own pass, if any."""
    installed = getattr(functorch_config, "joint_custom_pass", own)  # if this torch has no such option, there is none
    if installed is own or getattr(installed, "_coarsegrad", None) is own:
        return

    def both(module: torch.fx.GraphModule, *args: object) -> torch.fx.GraphModule:
        return own(installed(module, *args) if callable(installed) else module, *args)

    both._coarsegrad = own  # type: ignore[attr-defined]
    functorch_config.joint_custom_pass = both


def tag_compile_caches(tag: str) -> None:
    """Let the keys of torch's caches of compiled code contain a tag. They have the names of ops, not how these are
    lowered, nor `joint_custom_pass`."""
    config = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether a node of a joint graph is a gradient that the backward is given."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def is_recomputed(node: torch.fx.Node) -> bool:
    """Whether a checkpoint has the backward compute a node of a joint graph again."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def without_tracer(graph: torch.fx.Graph) -> torch.fx.Graph:
    """The graph without the tracer of torch.export, which cannot trace it again as it is unpickled."""
    graph._tracer_cls = None
    return graph


def keep_in_backward(node: torch.fx.Node) -> None:
    """Forbid the cut of a joint graph to place a node in the forward."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def set_preserved(module: torch.fx.GraphModule, name: str, value: object) -> None:
    """Set an attribute that copies of the module keep."""
    setattr(module, name, value)
    module.meta.setdefault("_user_preserved_attributes", {})[name] = value


# --------------------------------------------------------------------------------------- tensors


def view_root(t: Tensor) -> Tensor:
    """The tensor that t is a view of; t itself if it is not a view."""
    return t._base if t._is_view() else t  # type: ignore[return-value]


def storage_id(t: Tensor) -> int:
    """A number that identifies t's storage, even without memory (meta, fake)."""
    return t.untyped_storage()._cdata


def components(t: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that t consists of: t itself, or indices and values of a sparse t."""
    return (t,) if t.layout is torch.strided else (t._indices(), t._values())


def nested_like(values: Tensor, x: Any) -> Tensor:
    """A nested tensor with the structure of the contiguous nested tensor x and the given values."""
    if x.layout is torch.jagged:
        lengths = (x._maybe_min_seqlen, x._maybe_max_seqlen)
        return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths(), x._ragged_idx, *lengths)
    parts = (x._nested_tensor_size(), x._nested_tensor_strides(), x._nested_tensor_storage_offsets())
    return torch._nested_view_from_buffer(values, *parts)


@contextlib.contextmanager
def quiet_onnx_exporter() -> Iterator[None]:
    """Without what torch.onnx.export says of torch itself: that it uses something deprecated, and, in an environment
    without torchvision, that it has no operators of torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def unsafe_view(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A temporary in another shape that autograd and FSDP2 do not take for a view, as F.linear returns it."""
    return torch.ops.aten._unsafe_view.default(t, shape)
