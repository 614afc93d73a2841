"""`convert`: a trained network as integers, by rewriting its exported graph."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .._torch_internals import set_preserved, tree_leaves, tree_map, without_tracer
from .checks import check_weight_bits
from .ops import warn_if_slow
from .rewriting import Rewriting
from .trained import trained_codes, with_plain_weights

_INTEGER_OP = "coarsegrad.integer_"


def convert(
    model: nn.Module, example_inputs: tuple, *, weight_bits: int | Mapping[str, int] | None = None
) -> torch.fx.GraphModule:
    """A copy of a trained network for inference in which layers that read the output of a QReLU compute with integers.

        acc = sum(code * w)                                             an exact integer
        next code = #{k : v > T[k]},   v = alpha * w_scale * acc + bias  and the BatchNorm after it

    The next code is that of the real numbers v and T[k], decided on acc by thresholds found in rational arithmetic: the
    same on every backend. A Linear, Conv1d or Conv2d is converted where its input is codes, also through flatten, view,
    permute, max pooling, zero padding, slices and concatenation, and through average pooling and sums of branches whose
    sums of codes stay within 255; the BatchNorm after it is folded. Where a QReLU follows it, the output is codes, else
    float32: float32(float32(acc) * scale) + offset. All else computes as before. A NaN in the input of a QReLU becomes
    its top code.

    model: in evaluation mode, with at least one QReLU. It is not changed and shares no tensor with the result. Neither
        compiled by `torch.compile(model)` nor wrapped in DataParallel or DistributedDataParallel.
    example_inputs: a tuple of the model's positional arguments, on its device. The model is exported with them by
        torch.export; the first dimension of tensors is dynamic.
    weight_bits: 8 (integers in -127..127), 4 (-7..7), 2 (-2..1) or 1 (-1, 1): for all layers, or by the name of the
        layer's module; 8 for those not named, and for all if None. Each output channel has a scale. 8 bits are nearly
        lossless by rounding alone; 2 and 1 are for networks whose weights were trained for it. A layer with a `QWeight`
        has the codes and scales of that, and its bits: weight_bits must be None, leave it out, or agree.

    Returns a GraphModule in evaluation mode. Its `report` lists what became integer, and what stays float and why; a
    warning says if nothing did. The first time that there are no compiled kernels for its integer layers on their
    device, a warning says so, unless COARSEGRAD_NATIVE=0 asks for none. Its state_dict has an entry for the numbers
    that are constants of the graph, such as bits and the steps of sums: `load_state_dict` rejects that of a conversion
    with others.

    Raises TypeError or ValueError for a wrong argument, such as weight_bits that contradict a QWeight, a model in
    training mode, without a QReLU, or converted before; and ValueError, with the reason, where the model does not run
    on example_inputs or torch.export cannot export it.

    Source: Jacob et al. 2018, arXiv 1712.05877 (integer inference of networks trained with quantization).
    """
    check_model(model, example_inputs)
    for bits in (
        weight_bits.values() if isinstance(weight_bits, Mapping) else [8 if weight_bits is None else weight_bits]
    ):
        check_weight_bits(bits)
    trained = trained_codes(model)
    graph_module = exported_graph(with_plain_weights(model) if trained else model, example_inputs)
    targets = {str(node.target) for node in graph_module.graph.nodes}
    if any(target.startswith(_INTEGER_OP) for target in targets):
        raise ValueError("model is converted already")
    if not any(target.startswith("coarsegrad.qrelu") for target in targets):
        raise ValueError("model must have a QReLU that runs on example_inputs; coarsegrad.quantize_ puts them in")
    _check_shapes_in(graph_module)
    rewriting = Rewriting(graph_module, weight_bits, trained)
    rewriting.run()
    converted = torch.fx.GraphModule(graph_module, without_tracer(graph_module.graph), type(model).__name__)
    _own_tensors(converted)
    converted.get_submodule("input_shapes").constants = _digest(converted.graph)
    set_preserved(converted, "report", rewriting.report)
    if hasattr(model, "save_pretrained"):
        set_preserved(converted, "save_pretrained", _refuse_save_pretrained)
    if rewriting.report.converted:
        warn_if_slow(rewriting.report.device)
    else:
        warnings.warn(
            "no layer became integer; the report of the result says why: print(converted.report)", stacklevel=2
        )
    return converted.eval()


def _refuse_save_pretrained(*args: object, **kwargs: object) -> None:
    """The method of models of transformers, which a graph has no config for."""
    raise TypeError(
        "save_pretrained cannot save the graph that convert returns: save the model that it was made from, and convert"
        " that again after from_pretrained, which gives the same integers; or torch.save the graph"
    )


class InputShapes(nn.Module):
    """A check of the sizes that an exported graph is made for, and in its state_dict of the graph's constants. shapes:
    by name of an input, None for a size that is free."""

    constants: Tensor | None = None  # a digest; older files have none

    def __init__(self, shapes: dict[str, list[int | None]]) -> None:
        super().__init__()
        self.shapes = shapes

    def get_extra_state(self) -> Tensor | None:
        return self.constants

    def set_extra_state(self, state: Tensor | None) -> None:
        """Sets nothing: `_load_from_state_dict` compares."""

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors) -> None:
        extra = f"{prefix}_extra_state"
        given = state.get(extra)
        if given is not None and self.constants is not None and not torch.equal(given.cpu(), self.constants):
            errors.append(
                f"{extra}: got the integers of a network that was converted with other bits, roundings, weight_bits or"
                " alphas, wanted those of one converted as this was; load the state of the float network, and convert"
            )
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if extra in missing:
            missing.remove(extra)

    def forward(self, *inputs: Tensor) -> None:
        for (name, shape), x in zip(self.shapes.items(), inputs):
            if x.dim() != len(shape) or any(size not in (None, got) for size, got in zip(shape, x.shape)):
                wanted = ", ".join("*" if size is None else str(size) for size in shape)
                raise ValueError(f"{name} must have shape [{wanted}], as in example_inputs, got {list(x.shape)}")


def _check_shapes_in(module: torch.fx.GraphModule) -> None:
    """Put `InputShapes` in the place of torch.export's guards, which cannot be pickled."""
    for node in [node for node in module.graph.nodes if node.target == "_guards_fn"]:
        module.graph.erase_node(node)
    inputs = [n for n in module.graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor)]
    module.input_shapes = InputShapes(
        {n.target: [size if isinstance(size, int) else None for size in n.meta["val"].shape] for n in inputs}
    )
    with module.graph.inserting_after(next(n for n in reversed(module.graph.nodes) if n.op == "placeholder")):
        module.graph.call_module("input_shapes", tuple(inputs))


def _digest(graph: torch.fx.Graph) -> Tensor:
    """Of the numbers and words that its calls are given beside nodes: 32 bytes, as uint8."""
    calls = []
    for node in graph.nodes:
        if node.op == "call_function":
            leaves = tree_leaves((node.args, dict(sorted(node.kwargs.items()))))
            constants = [repr(leaf) for leaf in leaves if isinstance(leaf, (bool, int, float, str))]
            calls += [(str(node.target), constants)] if constants else []
    return torch.tensor(list(hashlib.sha256(repr(calls).encode()).digest()), dtype=torch.uint8, device="cpu")


def _own_tensors(module: nn.Module) -> None:
    """Copies in the place of tensors that are the original model's; none requires grad."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.detach().clone()


def _wraps(model: nn.Module, name: str) -> bool:
    """Whether the model is what torch.compile, DataParallel or DistributedDataParallel made of its submodule `name`."""
    if name == "module":
        return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return name in model._modules


def check_model(model: nn.Module, example_inputs: tuple) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"example_inputs must be a tuple of arguments, got {type(example_inputs).__name__}")
    if any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(example_inputs)):
        raise ValueError("example_inputs must hold values, got a tensor on the meta device")
    if inner := next((name for name in ("_orig_mod", "module") if _wraps(model, name)), None):
        raise ValueError(f"model must not be wrapped, got a {type(model).__name__}: pass model.{inner}")
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    meta = next((name for name, t in tensors if t.is_meta), None)
    if meta is not None:
        raise ValueError(f"model must hold values, but {meta} is on the meta device")
    # torch leaves the containers of a parametrization in training mode; they compute nothing.
    modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, (nn.ModuleDict, nn.ModuleList))]
    training = next((name for name, module in modules if module.training), None)
    if training is not None:
        raise ValueError(f"model must be in evaluation mode, but {training or 'it'} is in training mode: model.eval()")


def exported_graph(model: nn.Module, example_inputs: tuple) -> torch.fx.GraphModule:
    """The graph of the model in ATen ops, with the first dimension of its inputs dynamic."""
    inputs, dynamic = batched(example_inputs)
    with torch.no_grad():
        with refusal("model must run on example_inputs"):  # export would let some inputs pass that it cannot run on
            model(*example_inputs)
        with refusal("model cannot be exported by torch.export"):
            return torch.export.export(model, inputs, dynamic_shapes=dynamic, strict=False).module()


@contextlib.contextmanager
def refusal(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{what}: {type(error).__name__}: {reason}") from error


def batched(example_inputs: tuple) -> tuple[tuple, tuple]:
    """(inputs, dynamic_shapes). torch.export takes a size of 1 as fixed, so one example becomes two equal ones."""
    tensors = [t for t in tree_leaves(example_inputs) if isinstance(t, Tensor) and t.dim()]
    if any(t.size(0) == 0 for t in tensors):
        raise ValueError("example_inputs must hold at least one example, got an empty tensor")
    single = all(t.size(0) == 1 for t in tensors)

    def doubled(t: object) -> object:
        return torch.cat([t, t]) if single and isinstance(t, Tensor) and t.dim() else t

    def dynamic(t: object) -> object:
        return {0: torch.export.Dim.AUTO} if isinstance(t, Tensor) and t.dim() and (single or t.size(0) > 1) else None

    return tree_map(doubled, example_inputs), tree_map(dynamic, example_inputs)
