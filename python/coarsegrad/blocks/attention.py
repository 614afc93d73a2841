"""Staircases of q, k and v, in models of transformers: by an attention function of their interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..signed import QSigned
from .conversion import CannotConvert, Conversion

_PREFIX = "coarsegrad_"
_STAIRCASES = "_coarsegrad_attention"


class Attention:
    """What an attention module does: `inner`, the implementation called `name`, on staircased q, k and v.

    staircase: None for a module that keeps its q, k and v, but shares its config with one that does not.
    """

    def __init__(self, name: str, inner: Callable, staircase: QSigned | None) -> None:
        self.name, self.inner, self.staircase = name, inner, staircase

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a new process the implementation is not registered yet."""
        self.__dict__.update(state)
        _register(self.name)

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> object:
        if self.staircase is not None:
            q, k, v = (self._staircased(x) for x in (q, k, v))
        return self.inner(module, q, k, v, *args, **kwargs)

    def _staircased(self, x: Tensor) -> Tensor:
        """The staircase of rows of [batch, heads, length, features], in the order in which layers make them."""
        return self.staircase(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[misc]


def _attend(module: nn.Module, *args: object, **kwargs: object) -> object:
    """The attention function that is registered."""
    return getattr(module, _STAIRCASES)(module, *args, **kwargs)


def _register(name: str) -> str:
    """Register the implementation for a config whose own one is `name`. It masks as that does."""
    import transformers.masking_utils as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours = _PREFIX + name
    ALL_ATTENTION_FUNCTIONS.register(ours, _attend)
    if name in masks.ALL_MASK_ATTENTION_FUNCTIONS:
        masks.ALL_MASK_ATTENTION_FUNCTIONS.register(ours, masks.ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours


def convert_attention(conversion: Conversion, settings: dict[str, Any]) -> None:
    """Give every attention module of transformers the implementation with staircases."""
    found = [(name, m) for name, m in conversion.model.named_modules() if _calls(m, "ALL_ATTENTION_FUNCTIONS")]
    for name, module in conversion.model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or _calls(module, "scaled_dot_product_attention"):
            why = "it is not from transformers: apply coarsegrad.qsigned to q, k and v in its forward"
            conversion.skip(name, module, why)
    configs: dict[int, Any] = {}
    for name, module in found:
        try:
            made = _attention_for(module, settings, conversion.wanted(module, name))
        except CannotConvert as why:
            conversion.skip(name, module, why)
            continue
        conversion.set(module, _STAIRCASES, made)
        configs[id(module.config)] = module.config
        if made.staircase is not None:
            conversion.add(name, "q, k and v", made.staircase)
    for config in configs.values():
        _set_implementation(conversion, config)


def attention_of(module: nn.Module) -> Attention | None:
    """What `convert_attention` has given to a module."""
    return vars(module).get(_STAIRCASES)


def give_attention(conversion: Conversion, found: Iterable[tuple[nn.Module, QSigned | None]]) -> None:
    """Give modules that `convert_attention` converted in another copy of the model their staircases."""
    configs: dict[int, Any] = {}
    for module, staircase in found:
        conversion.set(module, _STAIRCASES, _attention(module, staircase))
        configs[id(module.config)] = module.config
    for config in configs.values():
        _set_implementation(conversion, config)


def _calls(module: nn.Module, name: str) -> bool:
    """Whether the forward of the module's class mentions a global name."""
    forward = inspect.unwrap(type(module).forward)
    return name in getattr(getattr(forward, "__code__", None), "co_names", ())


def _attention_for(module: Any, settings: dict[str, Any], wanted: bool) -> Attention:
    if _STAIRCASES in vars(module):
        raise CannotConvert("it has staircases already")
    if getattr(module, "config", None) is None:
        raise CannotConvert("it has no config")
    group, size = settings.get("group"), getattr(module, "head_dim", None)
    if wanted and group is not None and isinstance(size, int) and size % group:
        raise CannotConvert(f"a group of {group} does not divide the {size} features of a head")
    return _attention(module, QSigned(**settings) if wanted else None)


def _attention(module: Any, staircase: QSigned | None) -> Attention:
    """The staircase around the implementation that the module's config names."""
    names = inspect.unwrap(type(module).forward).__globals__
    name = module.config._attn_implementation or "eager"
    inner = names["ALL_ATTENTION_FUNCTIONS"].get_interface(name, names.get("eager_attention_forward"))
    if inner is None:
        raise CannotConvert(f"its implementation, {name!r}, is part of its forward")
    return Attention(name, inner, staircase)


def _set_implementation(conversion: Conversion, config: Any) -> None:
    """Set that of one config, and not of those inside it."""
    before = config._attn_implementation

    def put(name: str | None) -> None:
        config._attn_implementation = {"": name}

    put(_register(before or "eager"))
    conversion.undo_steps.append(lambda: put(before))
