"""`quantize_`: QReLU in place of the ReLUs of a model that somebody else wrote, with a report and a way back."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from ..nn import QReLU
from .dynamic import Conversion
from .report import QuantizeReport
from .rewriting import find_calls, original
from .surgery import Surgery

_WHY_OWN = {
    "inplace": "a QReLU is in place where what it replaces was",
    "squared": "a QReLU squares where what it replaces did",
    "dropout": "places differ; fold_dropout=True takes over the dropouts that the model has",
    "num_channels": "channels differ from place to place; `calibrate` with channel_dim finds an alpha for each",
    "channel_dim": "`calibrate` with channel_dim finds an alpha for each channel, and sets it",
}


def quantize_(
    model: nn.Module,
    bits: int = 4,
    *,
    rounding: str = "nearest",
    replace: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    fold_dropout: bool = False,
    example_inputs: object = None,
    **settings: object,
) -> QuantizeReport:
    """Puts a `QReLU` in the place of every ReLU of `model`, in place, and reports what was and what was not replaced.

    Each place where an activation is called gets a QReLU of its own, with its own alpha. Found without a run:

    - submodules: nn.ReLU (also a module that is shared, under each of its names; one with inplace=True stays in place
      where the STE allows it), nn.ReLU6 and nn.Hardtanh(0, limit) (the limit is the top level), nn.Threshold(0, 0),
      nn.LeakyReLU(0), and modules whose forward is written as relu(x) or its square (then `squared=True`);
    - `self.relu(x)` in several places of a module's methods: the first keeps the name, the others are `relu_1`, ...;
    - calls of torch.relu, F.relu, x.relu() and their in-place forms in the methods of a module, with or without a
      square around them: submodules `qrelu`, `qrelu_1`, ... of that module; the same for the nodes of a traced graph;
    - attributes that hold such a function, as nn.TransformerEncoderLayer has.

    With `example_inputs` the model is run in evaluation and in training mode, without gradients and with nothing left
    behind, and what counts is what runs:

    - every relu, whoever calls it (functions outside of the model, tables of functions, F.relu handed on, modules made
      in a forward), also as clamp(min=0), maximum(x, 0), hardtanh(x, 0, limit), threshold(x, 0, 0), leaky_relu(x, 0);
    - an alpha for each run, where one line runs several times in a forward: for each way of calls to it, and in a loop
      for each module behind which it runs. In a loop over time, and in a block that is used several times, it is one
      alpha, and the report says for how many runs;
    - in the end the QReLUs are made relus again, and the model must compute what it computed.

    An instance whose methods have calls gets a subclass of its class, of the same name, with those methods compiled
    anew in the wrappers that they had; the class itself and its other instances stay as they are, and so do functions
    outside of it. What cannot be found or changed so (scripted modules, modules with hooks, a forward that was replaced
    on the instance, relus inside of a kernel) is in `report.skipped`; `calibrate` names the lines in which a relu is
    still called. torch's transformer encoder no longer takes its fused kernel, which has a relu inside.

    model: any nn.Module, not yet compiled or wrapped (DDP, FSDP, accelerate's hooks): do that to the result.
    bits: 1..8.
    rounding: "nearest", with which a network that was trained with ReLU loses least (`python -m coarsegrad rounding`);
        "ceil", which a QReLU has by itself; or "hwgq". With ste `relu` and a fixed alpha "nearest" keeps a bit more.
    replace: the classes to replace, and with them the functions of their names in lower case in torch.nn.functional:
        with nn.GELU or nn.SiLU the network computes something else afterwards, and must be trained.
    filter_fn: filter_fn(module, name) says whether to replace: of a submodule it and its name; of a call in a method
        the module that has the method, and the name that the new QReLU would have.
    fold_dropout: a QReLU takes over the nn.Dropout that alone gets its output (`self.dropout(self.act(x))`; `h =
        self.act(h)` and then `h = self.dropout(h)`, as in T5; neighbours in an nn.Sequential), and an nn.Identity stays
        in its place. What the next layer keeps are then codes (see QReLU's dropout). One after an activation that works
        in place stays. What looks for nn.Dropouts in the model, to change their p, finds none there any more.
    example_inputs: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keywords; tensors are
        moved to the model's device. Small ones will do. Calls are told apart from Python 3.11 on.
    settings: keywords of `QReLU`, the same for all. alpha is a placeholder, the best for unit Gaussian inputs, until it
        is given, or found by `calibrate`.

    Once more on the same model it replaces what is left. Returns a `QuantizeReport`, whose `undo()` puts all back.

    Raises TypeError or ValueError for what QReLU refuses, for keywords that belong to each place (inplace, squared,
    dropout, num_channels, channel_dim), if `model` is itself an activation, and if nothing was replaced and no QReLU
    was there: the message says what was skipped. Raises what the model raises on `example_inputs`, and RuntimeError if
    it computes something else afterwards, with float activations in the QReLUs. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(replace, (tuple, list)) or not all(
        isinstance(c, type) and issubclass(c, nn.Module) and c is not nn.Module for c in replace
    ):
        raise TypeError(f"replace must be a tuple of module classes, got {replace!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {filter_fn!r}")
    for name in settings.keys() & _WHY_OWN:
        raise TypeError(f"{name} cannot be given for all: {_WHY_OWN[name]}")
    settings["rounding"] = rounding
    QReLU(bits, **settings)  # refuses what is wrong before anything is changed
    surgery = Surgery(model, bits, tuple(replace), filter_fn or (lambda module, name: True), fold_dropout, settings)
    report = surgery.report
    conversion = None if example_inputs is None else Conversion(surgery, example_inputs)
    try:
        surgery.run()
        if conversion is not None:
            conversion.run()
    except BaseException:
        report.undo()
        raise
    if not report.replaced and not report.already:
        raise ValueError(_nothing_replaced(model, replace, report))
    return report


def _nothing_replaced(model: nn.Module, replace: tuple[type[nn.Module], ...], report: QuantizeReport) -> str:
    wanted = ", ".join(c.__name__ for c in replace)
    skipped = "; ".join(f"{s.name} ({s.what}): {s.why}" for s in report.skipped)
    text = f"model has no {wanted} and no call of one to replace. Skipped: {skipped or 'nothing'}"
    if others := [kind.__name__ for kind in (nn.SiLU, nn.GELU) if kind not in replace and _has(model, kind)]:
        text += (
            f". It has {' and '.join(others)}: replace=(torch.nn.{others[0]},) puts QReLUs there, but a QReLU is no"
            f" {others[0]}, and the model has to be trained with it"
        )
    if not report.executed:
        text += ". Only the source of its methods was looked at: give example_inputs to find what else calls a relu"
    return text


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the model has activations of that kind, as modules or as calls of the function."""
    word = kind.__name__.lower()
    functions = frozenset({getattr(F, word)})
    return any(
        word in type(module).__name__.lower()
        or any(call.function for call in find_calls(original(type(module))[0], functions).calls)
        for module in model.modules()
    )
