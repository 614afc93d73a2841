"""`quantize_` and `convert` as a configuration of torchao's `quantize_`, in its steps "prepare" and "convert"."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from .._text import one_of
from ..integer import convert
from ..quantization import QuantizeReport, check_arguments, quantize_

_STEPS = ("prepare", "convert")


def whole_model(module: nn.Module, name: str) -> bool:
    """A filter_fn of torchao's `quantize_` that selects the model itself, and not each of its layers."""
    return name == ""


class StaircaseConfig(AOBaseConfig):
    """What torchao's `quantize_` does to the modules that its filter_fn selects: our `quantize_`, and then `convert`.

        torchao.quantization.quantize_(model, StaircaseConfig(bits=4), filter_fn=whole_model)
        ...  # calibrate, train, model.eval()
        config = StaircaseConfig(step="convert", example_inputs=(x,))
        torchao.quantization.quantize_(model, config, filter_fn=whole_model)

    step: "prepare" inserts staircases, as arguments of `quantize_` say, but for the model. "convert" makes integers,
        as the arguments of `convert` say, of which example_inputs are those of the selected module. The module itself
        becomes the graph, as torchao's `quantize_` returns nothing: it then has its class, state and `report`.

    torchao hands over one module at a time. What `quantize_` finds by looking at a model, such as calls of relu in
    methods, tensors that two layers read, and gated MLPs, it finds inside of what is selected. So select the model, by
    `whole_model`, or blocks of it; and single layers for `weight_bits` alone. An activation that is selected by itself
    is replaced. torchao's default selects every nn.Linear, in which there is no activation.

    reports: what `quantize_` reported of each module that it prepared, with its `undo`.

    Raises TypeError or ValueError for what `quantize_` refuses, for a wrong step, and for arguments of the other step;
    and, while torchao quantizes, what `quantize_` and `convert` raise, and ValueError for a layer that is selected by
    itself with `bits`.
    """

    def __init__(self, *, step: str = "prepare", **arguments: Any) -> None:
        if step not in _STEPS:
            raise ValueError(one_of("step", step, _STEPS))
        if step == "prepare":
            check_arguments(**arguments)
        else:
            try:
                inspect.signature(convert).bind(None, **arguments)
            except TypeError as error:
                raise TypeError(f"the arguments of step 'convert' must be those of convert: {error}") from error
        self.step, self.arguments = step, arguments
        self.reports: list[QuantizeReport] = []

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.arguments.items() if name != "example_inputs")
        return f"StaircaseConfig(step={self.step!r}{given})"


@register_quantize_module_handler(StaircaseConfig)
def _quantized(module: nn.Module, config: StaircaseConfig) -> nn.Module:
    """torchao's handler: what takes the place of a selected module, which is the module, but for an activation."""
    if config.step == "convert":
        # torchao does not hand out what replaces the model itself.
        return _become(module, convert(module, **config.arguments))
    bits = config.arguments.get("bits", 4)
    if bits is not None and isinstance(module, nn.Linear):
        raise ValueError(
            f"filter_fn must select modules with activations inside for bits={bits}, got a Linear:"
            " pass filter_fn=whole_model to torchao's quantize_, or bits=None and weight_bits for layers"
        )
    kinds = config.arguments.get("replace", (nn.ReLU, nn.ReLU6))
    if not isinstance(module, tuple(kinds)):
        config.reports.append(quantize_(module, **config.arguments))
        return module
    holder = nn.Sequential(module)
    report = quantize_(holder, **config.arguments)
    made = holder[0]
    # torchao puts it where only the parent of the activation, which is not known here, could take it out again.
    report._undo_steps.append(functools.partial(_become, made, module))
    config.reports.append(report)
    return made


def _become(module: nn.Module, made: nn.Module) -> nn.Module:
    """Make a module what `made` is, in its place in whatever has it."""
    module.__class__ = type(made)
    module.__dict__ = made.__dict__
    return module
