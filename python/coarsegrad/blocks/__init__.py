"""Signed staircases in the blocks of a model: before layers, in gated MLPs, in attention, after norms.

Hooks and attributes of instances do it; no class and no entry of a state_dict changes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .attention import attention_of, convert_attention
from .conversion import Conversion, Staircase, settings_of
from .description import KEYS, described, rebuild
from .gates import GatedForward, convert_gates
from .inputs import StaircaseInput, convert_inputs, is_transposed
from .norms import checked_gradient, convert_norms
from .tags import close_forward, open_forward

__all__ = [
    "KEYS",
    "BlockOptions",
    "Conversion",
    "Staircase",
    "convert_blocks",
    "described",
    "has_staircases",
    "is_transposed",
    "rebuild",
]


class BlockOptions:
    """The keywords of `quantize_` for blocks, checked."""

    def __init__(self, inputs: object, gates: object, attention: object, norms: str | None) -> None:
        self.norms = None if norms is None else checked_gradient(norms)
        if self.norms is not None and inputs is None:
            raise ValueError(f"inputs must be given with norms={norms!r}: a norm has the staircase of its readers")
        given = {"inputs": inputs, "gates": gates, "attention": attention}
        self.settings = {
            name: settings_of(name, value, ("bits", "group", "rotation")[: 3 if name == "inputs" else 2])
            for name, value in given.items()
            if value is not None
        }

    def __bool__(self) -> bool:
        return bool(self.settings)


def convert_blocks(conversion: Conversion, options: BlockOptions) -> None:
    """Insert the staircases. Raises ValueError if an option found nothing to convert; then undo what was done."""
    settings, norms = options.settings, options.norms
    if "gates" in settings:
        _converted(conversion, "gates", "gated MLP", lambda: convert_gates(conversion, settings["gates"]))
    if "attention" in settings:
        what = "attention module of transformers"
        _converted(conversion, "attention", what, lambda: convert_attention(conversion, settings["attention"]))
    if "inputs" not in settings:
        return
    what = "Linear or Conv"
    staircases = _converted(conversion, "inputs", what, lambda: convert_inputs(conversion, settings["inputs"]))
    conversion.hook(conversion.model.register_forward_pre_hook(open_forward))
    conversion.hook(conversion.model.register_forward_hook(close_forward, always_call=True))
    if norms is not None:
        _converted(conversion, "norms", "norm", lambda: convert_norms(conversion, norms, staircases))


def _converted(conversion: Conversion, option: str, what: str, convert: Callable) -> dict:
    """The result of one conversion, which must insert a staircase."""
    staircases, skipped = len(conversion.staircases), len(conversion.skipped)
    result = convert()
    if len(conversion.staircases) == staircases:
        reasons = "; ".join(f"{name} ({kind}): {why}" for name, kind, why in conversion.skipped[skipped:])
        raise ValueError(f"{option}: model has no {what} that can be converted. Skipped: {reasons or 'nothing'}")
    return result


def has_staircases(model: nn.Module) -> bool:
    """Whether `convert_blocks` has converted something in a model."""
    return any(
        any(isinstance(hook, StaircaseInput) for hook in module._forward_pre_hooks.values())
        or isinstance(vars(module).get("forward"), GatedForward)
        or attention_of(module) is not None
        for module in model.modules()
    )
