"""A trained network as integers: accuracy, size and time of inference next to float."""

from __future__ import annotations

import copy
import functools
import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._text import format_table
from ..integer import ConvertReport, convert, round_weights
from .data import Split
from .files import ExperimentError
from .measure import interleaved_times

_EVALUATION_BATCH = 1000
_TIMED_BATCHES = 20
# Predictions may differ from the simulated network's only where float rounding moves a value across a threshold.
_MOST_DIFFERING = 1e-3


def measure_integers(float_model: nn.Module, model: nn.Module, test: Split, batch: Split, weight_bits: int) -> dict:
    """Test accuracy, bytes and seconds per batch of the float network, of `model` and of `model` converted; and the
    number of test images for which the converted network and the simulated one, `model` with its weights rounded,
    predict different classes. weight_bits: of the weights that are not trained to few bits."""
    model = copy.deepcopy(model).eval()
    converted = convert(model, (batch.x,), weight_bits=weight_bits)
    report: Any = converted.report
    predictions = _predictions(converted, test.x)
    expected = _predictions(_simulated(model, report), test.x)
    differing = int((predictions != expected).sum())
    networks = {"float": copy.deepcopy(float_model).eval(), "simulated": model, "integer": converted}
    seconds = interleaved_times(
        {name: functools.partial(_forward, network, batch.x) for name, network in networks.items()},
        _TIMED_BATCHES,
        batch.x.device,
    )
    results: dict = {
        name: {
            "test_accuracy": float((_predictions(network, test.x) == test.y).double().mean()),
            "bytes": sum(t.nbytes for t in (*network.parameters(), *network.buffers())),
            "batch_seconds": statistics.median(seconds[name]),
        }
        for name, network in networks.items()
    }
    return results | {"weight_bits": weight_bits, "differing": differing, "report": str(report)}


def check_same(results: dict, images: int) -> None:
    """Raises ExperimentError if the converted and the simulated network of `measure_integers` predict different classes
    for more than one image in a thousand."""
    differing = results["differing"]
    if differing > _MOST_DIFFERING * images:
        raise ExperimentError(
            f"the converted network and the simulated one differ in {differing} of {images} predictions"
        )


def integers_table(results: dict, images: int, batch_size: int, bits: int) -> str:
    """The results of `measure_integers` as a table; `bits` of an activation."""
    base, simulated, integer = (results[name] for name in ("float", "simulated", "integer"))
    rows = [
        ("test accuracy", *(f"{r['test_accuracy']:.2%}" for r in (base, simulated, integer))),
        ("weights and state", *(f"{r['bytes'] / 1024:,.0f} KiB" for r in (base, simulated, integer))),
        (f"forward, {batch_size} images", *(f"{r['batch_seconds'] * 1e3:,.1f} ms" for r in (base, simulated, integer))),
    ]
    header = ("inference", "nn.ReLU", f"QReLU, {bits} bits", f"integers, {results['weight_bits']}-bit weights")
    return "\n".join(
        [
            format_table(header, rows),
            "",
            f"{results['differing']} of {images:,} predictions differ between the integers and a float network with the"
            " same rounded weights.",
            "",
            results["report"],
        ]
    )


def _simulated(model: nn.Module, report: ConvertReport) -> nn.Module:
    """The network with the weights of its integer layers rounded, in floats."""
    model = copy.deepcopy(model)
    for row in report.converted:
        if is_parametrized(model.get_submodule(row.name), "weight"):  # trained to few bits: it is rounded as it is
            continue
        weight = model.get_parameter(f"{row.name}.weight")
        weight.data = round_weights(weight, row.weight_bits).to(weight.dtype)
    return model


@torch.no_grad()
def _forward(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def _predictions(network: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([_forward(network, part).argmax(1) for part in x.split(_EVALUATION_BATCH)])
