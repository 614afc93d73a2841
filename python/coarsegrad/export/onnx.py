"""`export_onnx`: a trained network as an ONNX file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from .._checks import check_option
from .._torch_internals import quiet_onnx_exporter, tree_leaves
from ..integer import batched, check_model, exported_graph, refusal
from .forms import Form
from .levels import Levels
from .lowering import Lowering
from .packages import check_packages
from .qdq import Qdq
from .qonnx import Qonnx

FormName: TypeAlias = Literal["qdq", "qonnx", "levels"]
FORMS = get_args(FormName)
OPSETS = range(18, 28)

_FORMS: dict[str, type[Form]] = {"qdq": Qdq, "qonnx": Qonnx, "levels": Levels}


def export_onnx(
    model: nn.Module,
    example_inputs: tuple,
    path: str | os.PathLike[str],
    *,
    form: FormName = "qdq",
    opset: int = 18,
) -> None:
    """Write a model with QReLUs, or one that `convert` made of it, as an ONNX file.

    model: in evaluation mode, on the CPU. Its float weights are written as floats; the layers that `convert` made
        integer have their integers.
    example_inputs: a tuple of the model's positional arguments. It is exported with them by torch.export; the first
        dimension of tensors is dynamic.
    path: the file. A file that is there is replaced; if anything fails it is left as it was. What is beyond 2 GB is
        written to `path` + ".data" beside it.
    form:
        "qdq": QuantizeLinear, Min and DequantizeLinear, which onnxruntime and OpenVINO turn into layers on integers.
            Where x is exactly on a threshold the code may be the next one, the bias of an integer layer is rounded to
            its integers, and NaN has code 0.
        "qonnx": nodes MultiThreshold and Quant of the package qonnx, which FINN and hls4ml read. Exact; NaN has code 0.
        "levels": comparisons with the thresholds, for any runtime, in floats. Exact, NaN included.
    opset: of ONNX, 18 to 27.

    Exact: an integer layer has the code that `model` has, as has a staircase of the same float input. The layers that
    stay float are the runtime's own, and round as it does.

    Raises ImportError if the packages onnx and onnxscript are not installed; TypeError or ValueError for a wrong
    argument, a model in training mode or not on the CPU, and for what the form cannot say, such as a signed staircase
    with dynamic alphas; ValueError, with the reason, where the model does not run on example_inputs or torch cannot
    export it; and OSError if the file cannot be written.
    """
    check_option("form", form, FORMS)
    _check_opset(opset)
    check_packages()
    check_model(model, example_inputs)
    _check_devices(model, example_inputs)
    path = _checked_path(path)
    graph = Lowering(exported_graph(model, example_inputs), _FORMS[form]()).run()
    inputs, dynamic = batched(example_inputs)
    names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), refusal("model cannot be exported by torch.onnx"), _first_cause(), quiet_onnx_exporter():
        # torch takes the last of the arguments, if it is a dict, as keyword arguments: here there are none.
        program: Any = torch.onnx.export(
            graph, (*inputs, {}), dynamo=True, dynamic_shapes=dynamic, input_names=names, opset_version=opset,
            verbose=False,
        )  # fmt: skip
    for node in program.model.graph.all_nodes():  # paths and lines of this machine
        node.metadata_props.clear()
    with _replacing(path) as part:
        program.save(part)


@contextlib.contextmanager
def _first_cause() -> Iterator[None]:
    """torch.onnx wraps an error in its advice, several times."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path of the same name in a new folder, of which the files are moved to `path`'s if the block succeeds: those
    with its data first."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        part = Path(folder) / path.name
        yield part
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == part):
            os.replace(file, path.parent / file.name)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {path!r}")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, but {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that exists, got {path}")
    return path


def _check_opset(opset: int) -> None:
    if type(opset) is not int:
        raise TypeError(f"opset must be an int, got {opset!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be in {OPSETS[0]}..{OPSETS[-1]}, got {opset}")


def _check_devices(model: nn.Module, example_inputs: tuple) -> None:
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if t.device.type != "cpu":
            raise ValueError(f"model must be on the CPU, but {name} is on {t.device}: model.cpu()")
    for t in tree_leaves(example_inputs):
        if isinstance(t, Tensor) and t.device.type != "cpu":
            raise ValueError(f"example_inputs must be on the CPU, got a tensor on {t.device}")
