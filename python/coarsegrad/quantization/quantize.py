"""`quantize_`: QReLUs for the ReLUs of any model, signed staircases, low-bit weights; with a report and an undo."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from .._checks import check_option
from .._types import WEIGHT_STES, WeightBits, WeightSteName
from ..blocks import BlockOptions, Conversion, convert_blocks
from ..integer import check_weight_bits
from ..nn import QReLU
from .dynamic import DynamicConversion
from .report import QuantizeReport, Skipped
from .rewriting import find_calls, original
from .surgery import Surgery
from .weights import quantize_weights

_WHY_PER_LAYER = {
    "inplace": "a QReLU is in place if the activation it replaces was",
    "squared": "a QReLU squares its output if the activation it replaces did",
    "dropout": "it differs from layer to layer; fold_dropout=True absorbs the dropouts of the model",
    "num_channels": "it differs from layer to layer; `calibrate` with channel_dim finds per-channel alphas",
    "channel_dim": "`calibrate` with channel_dim finds per-channel alphas, and sets it",
}


# Who is told of each model after its conversion; each returns an undo step.
ON_QUANTIZE: list[Callable[[nn.Module], Callable[[], None]]] = []


def quantize_(
    model: nn.Module,
    bits: int | None = 4,
    *,
    rounding: str = "nearest",
    replace: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    fold_dropout: bool = False,
    example_inputs: object = None,
    inputs: int | Mapping[str, Any] | None = None,
    gates: int | Mapping[str, Any] | None = None,
    attention: int | Mapping[str, Any] | None = None,
    norms: str | None = None,
    weight_bits: WeightBits | None = None,
    weight_ste: WeightSteName = "identity",
    **settings: Any,
) -> QuantizeReport:
    """Replaces every ReLU of `model` by a `QReLU`, in place, and reports what was and was not replaced. On request it
    also inserts signed staircases (`qsigned`, with a dynamic alpha), with which blocks without a ReLU keep codes, and
    quantizes the weights (`QWeight`).

    Each place where an activation is called gets its own QReLU, with its own alpha. Found without running the model:

    - submodules: nn.ReLU (also if shared, under each of its names; with inplace=True it stays in place if the STE
      allows), nn.ReLU6 and nn.Hardtanh(0, limit) (the limit becomes the top level), nn.Threshold(0, 0),
      nn.LeakyReLU(0), and modules whose forward is written as relu(x) or its square (then `squared=True`);
    - `self.relu(x)` in several places of a module's methods: the first keeps the name, the others become `relu_1`, ...;
    - calls of torch.relu, F.relu, x.relu() and their in-place variants in a module's methods, also if squared: they
      become submodules `qrelu`, `qrelu_1`, ... of that module; likewise for the nodes of a traced graph;
    - attributes that hold such a function, as in nn.TransformerEncoderLayer.

    With `example_inputs` the model runs in evaluation and in training mode, without gradients or side effects. This
    finds:

    - every relu, whatever calls it (functions outside the model, tables of functions, F.relu passed as an argument,
      modules made in a forward), also as clamp(min=0), maximum(x, 0), hardtanh(x, 0, limit), threshold(x, 0, 0) or
      leaky_relu(x, 0);
    - lines that run several times. Each run gets its own alpha: one for each path of calls to the line and, in a loop,
      one for each module that precedes it. A loop over time, or a block used several times, shares one alpha, and the
      report says for how many runs.

    At the end it checks that the model still computes the same when the QReLUs act as relus.

    An instance whose methods contain such calls gets a subclass of its class, of the same name, with those methods
    recompiled inside their wrappers. The class itself, its other instances and functions outside of it do not change.
    What cannot be found or changed this way (scripted modules, modules with hooks, a forward replaced on the instance,
    relus inside a kernel) is in `report.skipped`; `calibrate` lists the lines that still call a relu. torch's
    transformer encoder no longer uses its fused kernel, which contains a relu.

    model: any nn.Module, not yet compiled or wrapped (DDP, FSDP, accelerate's hooks): do that to the result.
    bits: 1..8. None: no activation is replaced; then example_inputs, fold_dropout and settings must not be given.
    rounding: "nearest" loses least accuracy on a network trained with ReLU (`python -m coarsegrad rounding`). The
        others are "ceil", QReLU's own default, and "hwgq". With ste `relu` and a fixed alpha "nearest" saves one more
        bit per element.
    replace: the classes to replace, together with the functions of the same name in lower case in torch.nn.functional.
        With nn.GELU or nn.SiLU the network computes something else afterwards and must be trained.
    filter_fn: filter_fn(module, name) says whether to replace: for a submodule, the submodule and its name; for a call
        in a method, the module that has the method and the name of the QReLU to be inserted.
    fold_dropout: whether a QReLU absorbs the nn.Dropout that alone gets its output (`self.dropout(self.act(x))`; `h =
        self.act(h)` followed by `h = self.dropout(h)`, as in T5; neighbours in an nn.Sequential), which becomes an
        nn.Identity. The next layer then saves codes (see QReLU's dropout). A dropout after an in-place activation is
        not absorbed. Code that looks for nn.Dropout modules to change their p no longer finds them.
    example_inputs: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keywords. Tensors are
        moved to the model's device; small ones suffice. Finding calls requires Python 3.11.
    inputs: signed staircases in front of every Linear, Conv1d, Conv2d and Conv1D of transformers: their number of bits,
        or a mapping of `bits`, `group` and `rotation`, arguments of `QSigned`. Layers that read the same tensor share
        one; a layer that reads codes already, such as a QReLU's output, gets none. With a rotation the weight of the
        layer is rotated to match, unless another module has it too (an embedding), or the layer is a convolution.
    gates: the bits, or `bits` and `group`, of gate and up in gated MLPs, which then compute `gated_product`. Found are
        modules with layers gate_proj, up_proj, down_proj; w1, w3, w2; wi_0, wi_1, wo; or gate_up_proj, down_proj, whose
        new forward, before there are staircases in it, gives the bits of the old one on a random input. The layer after
        the product gets no staircase of `inputs`, as the product is kept as the codes of gate and up.
    attention: the bits, or `bits` and `group`, of q, k and v, per head and position, after the rotary embedding. In
        models of transformers that use its attention interface; `model.config` then names another implementation.
    norms: the gradient of RMSNorm and LayerNorm where a layer with a staircase of `inputs` reads their output, as for
        `norm_staircase`, whose forward they get: None: their own. "exact": the same, from x alone. "coarse": from the
        codes. Where something else reads the output as well, such as a residual sum, the norm also saves its input.
    weight_bits: 8, 4, 2 or 1 bits for the weight of every Linear, Conv1d to Conv3d, ConvTranspose1d to 3d, and Conv1D
        of transformers, with a scale per output channel: each gets a `QWeight`, after a rotation of `inputs`. Further
        calls with a filter_fn give other layers other bits. Not quantized are weights shared with an embedding, and
        what `get_output_embeddings()` of a model of transformers returns; put a QWeight on it to have it.
    weight_ste: the coarse gradient of these weights: "identity", "clipped" or "trust" (`qweight`).
    settings: keywords of `QReLU`, the same for all. By default alpha is a placeholder, the best for unit Gaussian
        inputs, to be set by `calibrate`.

    The signed staircases are hooks and attributes of instances: no class, submodule or entry of a state_dict is added,
    and copies and pickles of the model have them. A layer with a QWeight has another class, and its weight another name
    in the state_dict; it can be copied, but not pickled. `filter_fn` is asked for each layer, gated MLP, attention
    module and norm. In code compiled by torch.compile the output of a norm must not be written to in place before a
    layer reads it. In a checkpointed function a norm outside of it has its own gradient for the layers inside.

    A second call on the same model converts what is left. Returns a `QuantizeReport`; its `undo()` restores the model,
    rotated weights up to rounding.

    Raises TypeError or ValueError for what QReLU refuses, for keywords that differ from layer to layer (inplace,
    squared, dropout, num_channels, channel_dim), if `model` is itself an activation, if nothing was replaced and the
    model had no QReLU and nothing else was asked for, and if an option finds nothing to convert; the message lists what
    was skipped. For weight_bits also if a layer has a parametrization other than a QWeight, or if a weight belongs to
    two modules of which one is not quantized. Raises what the model raises on `example_inputs`, and
    RuntimeError if the model, with float activations in the QReLUs, computes something else. The model is unchanged
    after an error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    blocks = check_arguments(
        bits, rounding=rounding, replace=replace, filter_fn=filter_fn, fold_dropout=fold_dropout,
        example_inputs=example_inputs, inputs=inputs, gates=gates, attention=attention, norms=norms,
        weight_bits=weight_bits, weight_ste=weight_ste, **settings,
    )  # fmt: skip
    wanted, surgery = filter_fn or (lambda module, name: True), None
    if bits is not None:
        settings["rounding"] = rounding
        surgery = Surgery(model, bits, tuple(replace), wanted, fold_dropout, settings)
    report = QuantizeReport(_searched=False) if surgery is None else surgery.report
    conversion = None if surgery is None or example_inputs is None else DynamicConversion(surgery, example_inputs)
    try:
        if surgery is not None:
            surgery.run()
        if conversion is not None:
            conversion.run()
        if blocks:
            _convert_blocks(model, wanted, report, blocks)
        if weight_bits is not None:  # after rotations
            quantize_weights(model, weight_bits, weight_ste, wanted, report)
    except BaseException:
        report.undo()
        raise
    if not report.replaced and not report.already and not blocks and weight_bits is None:
        raise ValueError(_why_nothing_replaced(model, replace, report))
    for tell in ON_QUANTIZE:
        report._undo_steps.insert(0, tell(model))
    return report


def check_arguments(
    bits: int | None = 4,
    *,
    rounding: str = "nearest",
    replace: object = (nn.ReLU, nn.ReLU6),
    filter_fn: object = None,
    fold_dropout: bool = False,
    example_inputs: object = None,
    inputs: object = None,
    gates: object = None,
    attention: object = None,
    norms: str | None = None,
    weight_bits: int | None = None,
    weight_ste: str = "identity",
    **settings: Any,
) -> BlockOptions:
    """Raise what `quantize_` raises for its arguments, without a model. Returns those for blocks."""
    if not isinstance(replace, (tuple, list)) or not all(
        isinstance(c, type) and issubclass(c, nn.Module) and c is not nn.Module for c in replace
    ):
        raise TypeError(f"replace must be a tuple of module classes, got {replace!r}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be callable, got {filter_fn!r}")
    for name in settings.keys() - inspect.signature(QReLU).parameters:
        raise TypeError(f"{name} is no argument of quantize_, which are its own and those of QReLU for all layers")
    for name in settings.keys() & _WHY_PER_LAYER:
        raise TypeError(f"{name} cannot be set for all QReLUs: {_WHY_PER_LAYER[name]}")
    blocks = BlockOptions(inputs, gates, attention, norms)
    if weight_bits is not None:
        check_weight_bits(weight_bits)
        check_option("weight_ste", weight_ste, WEIGHT_STES)
    elif weight_ste != "identity":
        raise TypeError(f"weight_ste needs weight_bits, got {weight_ste!r} without")
    elif bits is None and not blocks:
        raise ValueError("bits, weight_bits, inputs, gates, attention or norms must be given, got None for all")
    if bits is not None:
        QReLU(bits, **{**settings, "rounding": rounding})
    elif settings or fold_dropout or example_inputs is not None:
        raise TypeError("bits must be 1..8 with arguments for QReLUs, got None")
    return blocks


def _convert_blocks(
    model: nn.Module, wanted: Callable[[nn.Module, str], bool], report: QuantizeReport, options: BlockOptions
) -> None:
    made = Conversion(model, wanted, report.staircases, undo_steps=report._undo_steps)
    convert_blocks(made, options)
    report.skipped += [Skipped(*entry) for entry in made.skipped]


def _why_nothing_replaced(model: nn.Module, replace: tuple[type[nn.Module], ...], report: QuantizeReport) -> str:
    wanted = ", ".join(c.__name__ for c in replace)
    skipped = "; ".join(f"{s.name} ({s.what}): {s.why}" for s in report.skipped)
    text = f"model has no {wanted} and no call of one to replace. Skipped: {skipped or 'nothing'}"
    if others := [kind.__name__ for kind in (nn.SiLU, nn.GELU) if kind not in replace and _has(model, kind)]:
        text += (
            f". It has {' and '.join(others)}: replace=(torch.nn.{others[0]},) replaces them, but a QReLU does not"
            f" approximate {others[0]}, and the model has to be trained with it"
        )
    if not report.executed:
        text += ". Only the source of its methods was searched; pass example_inputs to find all relus"
    return text


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the model has activations of this kind, as modules or as calls of the function."""
    word = kind.__name__.lower()
    functions = frozenset({getattr(F, word)})
    return any(
        word in type(module).__name__.lower()
        or any(call.function for call in find_calls(original(type(module))[0], functions).calls)
        for module in model.modules()
    )
