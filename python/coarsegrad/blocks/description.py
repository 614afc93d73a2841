"""The staircases that `convert_blocks` put into a model, as data for JSON, and put again into a fresh copy of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..norms import Formula
from ..signed import QSigned
from .attention import attention_of, give_attention
from .conversion import Conversion
from .gates import GatedForward, Names
from .inputs import StaircaseInput, mark_output
from .norms import NormForward
from .tags import close_forward, open_forward

# What `described` finds, by the name of the option that made it, and what it says of each.
KEYS = {
    "forwards": (),
    "marked": (),
    "inputs": ("bits", "group", "rotation"),
    "gates": ("layers", "act", "activation", "bits", "group"),
    "attention": ("bits", "group"),
    "norms": (*Formula._fields, "gradient", "staircases"),
}


def described(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(option, name of the module, settings) of everything that was inserted."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if hook is open_forward:
                yield "forwards", name, {}
            elif isinstance(hook, StaircaseInput):
                yield "inputs", name, _settings(hook.staircase, "rotation")
        for hook in module._forward_hooks.values():
            if hook is mark_output:
                yield "marked", name, {}
        forward = vars(module).get("forward")
        if isinstance(forward, NormForward):
            keys = [[one.bits, one.group, one.rotation] for one in forward.staircases.values()]
            yield "norms", name, {**forward.formula._asdict(), "gradient": forward.gradient, "staircases": keys}
        if isinstance(forward, GatedForward):
            what = {"layers": list(forward.names), "act": forward.act, "activation": forward.activation}
            yield "gates", name, {**what, **_settings(forward.staircase)}
        if (found := attention_of(module)) is not None:
            yield "attention", name, _settings(found.staircase)


def rebuild(model: nn.Module, found: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
    """Insert what `described` yielded of a model into another one of the same modules, which may be on meta."""
    conversion = Conversion(model, lambda module, name: True)
    attention: list[tuple[nn.Module, QSigned | None]] = []
    for option, name, settings in found:
        module = model.get_submodule(name)
        if option == "forwards":
            module.register_forward_pre_hook(open_forward)
            module.register_forward_hook(close_forward, always_call=True)
        elif option == "marked":
            module.register_forward_hook(mark_output)
        elif option == "inputs":
            module.register_forward_pre_hook(StaircaseInput(QSigned(**settings)), with_kwargs=True)
        elif option == "norms":
            keys = [tuple(key) for key in settings["staircases"]]
            made: dict[object, QSigned] = {
                key: QSigned(bits, group=group, rotation=rotation) for key in keys for bits, group, rotation in (key,)
            }
            formula = Formula(*(settings[name] for name in Formula._fields))
            vars(module)["forward"] = NormForward(module, formula, settings["gradient"], made)
        elif option == "gates":
            act, activation = settings["act"], settings["activation"]
            vars(module)["forward"] = GatedForward(
                module, Names(*settings["layers"]), act, activation, _staircase(settings)
            )
        else:
            attention.append((module, _staircase(settings)))
    give_attention(conversion, attention)


def _settings(staircase: QSigned | None, *more: str) -> dict[str, Any]:
    return {name: getattr(staircase, name, None) for name in ("bits", "group", *more)}


def _staircase(settings: dict[str, Any]) -> QSigned | None:
    return None if settings["bits"] is None else QSigned(settings["bits"], group=settings["group"])
