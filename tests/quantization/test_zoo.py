"""Conversion of every architecture of transformers that can be built small (`make test-zoo`); every run takes a sample.

The oracle knows nothing of modules or of source: it is the float network, whose i-th relu to execute is replaced by the
staircase.
"""

from __future__ import annotations

import copy
import pickle
import zlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import coarsegrad as cg
from coarsegrad.quantization import QuantizeReport

pytest.importorskip("transformers", minversion="5")
import zoo

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = 4
MODES = (False, True)  # model.training
_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_, F.relu6, Tensor.relu, Tensor.relu_}
_RELUS |= {op for packet in (torch.ops.aten.relu, torch.ops.aten.relu_) for op in (packet, packet.default)}
_CLAMPS = {torch.clamp, torch.clamp_, torch.clip, torch.clip_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_}
_CLAMP_MINS = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_MAXIMUMS = {torch.maximum, torch.max, Tensor.maximum, Tensor.max}


def is_relu(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call computes max(x, 0), or that with a bound, of floating-point numbers. A bound by another name is
    none on a tensor of one dimension, which is of lengths, variances or losses, nor where no weight is part of x."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if function in _RELUS:
        return True
    if not x.requires_grad:
        return False
    low = args[1] if len(args) > 1 else next((kwargs[k] for k in ("min", "min_val", "other") if k in kwargs), None)
    if function in _MAXIMUMS:  # else max's second argument is a dimension
        return isinstance(low, Tensor) and low.numel() == 1 and low.item() == 0 and x.dim() > 1
    if type(low) not in (int, float) or low != 0:
        return False
    if function in _CLAMPS:
        return x.dim() > 1 and (args[2] if len(args) > 2 else kwargs.get("max")) is None
    return function is F.hardtanh or function in _CLAMP_MINS and x.dim() > 1


def is_in_place(function: Callable, args: tuple, kwargs: dict) -> bool:
    second = args[1] if len(args) > 1 and function in (F.relu, F.relu6) else False
    return function.__name__.split(".")[0].endswith("_") or kwargs.get("inplace", second)


class Relus(TorchFunctionMode):
    """Counts the relus that execute, whoever calls them. instead(i, x), where given, is computed for the i-th."""

    def __init__(self, instead: Callable[[int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.count, self._instead = 0, instead

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not is_relu(function, args, kwargs):
            return function(*args, **kwargs)
        self.count += 1
        if self._instead is None:
            return function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        y = self._instead(self.count - 1, x)
        return x.copy_(y) if is_in_place(function, args, kwargs) else y


def relus_executed(model: nn.Module, inputs: dict[str, object]) -> int:
    with torch.enable_grad(), Relus() as relus:
        zoo.run(model, inputs)
    return relus.count


def tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


class Execution(NamedTuple):
    """Of a QReLU. behind: the module with parameters that ran last before it."""

    name: str
    layer: cg.QReLU
    largest_input: float
    behind: str


class Trial:
    """A network and its inputs. Each method runs it in train mode or not, from the same seed and the same buffers."""

    def __init__(self, specimen: zoo.Specimen) -> None:
        self.model, self._inputs = specimen.model, specimen.inputs
        for training in MODES:  # what first forwards set up
            with torch.no_grad():
                zoo.run(self.model.train(training), self._inputs)
        self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def run(self, training: bool, model: nn.Module | None = None) -> list[Tensor]:
        """The tensors of the outputs. model: instead of the network, as a copy of it."""
        model = model or self.model
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in self._buffers and buffer.shape == self._buffers[name].shape:
                    buffer.copy_(self._buffers[name])
        return tensors(zoo.run(model.train(training), self._inputs))

    @torch.no_grad()
    def outputs(self, training: bool, model: nn.Module | None = None) -> list[Tensor]:
        return self.run(training, model)

    def relus(self, training: bool) -> int:
        with torch.enable_grad(), Relus() as relus:
            self.run(training)
        return relus.count

    def with_staircases(self, training: bool, staircases: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """The oracle."""
        with torch.enable_grad(), Relus(lambda i, x: staircases[i](x)) as relus:
            outputs = [t.detach() for t in self.run(training)]
        assert relus.count == len(staircases), f"{relus.count} relus in float, {len(staircases)} QReLUs"
        return outputs

    def qrelus(self, training: bool) -> tuple[list[Execution], list[Tensor]]:
        """Each execution of a QReLU, in their order, and the outputs."""
        names, last = {module: name for name, module in self.model.named_modules()}, ""
        ran, handles = [], []

        def before(layer: cg.QReLU, args: tuple[Tensor]) -> None:
            largest = args[0].amax().item() if args[0].numel() else 0.0
            ran.append(Execution(names[layer], layer, largest, last))

        def after(module: nn.Module, *_: object) -> None:
            nonlocal last
            last = names[module]

        for module in names:
            if isinstance(module, cg.QReLU):
                handles.append(module.register_forward_pre_hook(before))
            elif module._parameters:
                handles.append(module.register_forward_hook(after))
        with torch.enable_grad():  # some of torch's kernels round in another way without it
            outputs = [t.detach() for t in self.run(training)]
        for handle in handles:
            handle.remove()
        return ran, outputs

    def gradients(self, staircases: list[Callable[[Tensor], Tensor]] | None = None) -> dict[str, Tensor]:
        """Of a step in train mode; with the staircases for the relus, where given: the oracle."""
        self.model.zero_grad()
        with Relus(staircases and (lambda i, x: staircases[i](x))):
            outputs = [y for y in self.run(True) if y.requires_grad]
        torch.stack([y.float().nan_to_num(0, 0, 0).square().mean() for y in outputs]).sum().backward()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def assert_same(got: list[Tensor], wanted: list[Tensor], what: str) -> None:
    assert len(got) == len(wanted), f"{what}: {len(got)} tensors, wanted {len(wanted)}"
    for i, (a, b) in enumerate(zip(got, wanted)):
        assert a.shape == b.shape, f"{what}: tensor {i} has shape {list(a.shape)}, wanted {list(b.shape)}"
        same = ((a == b) | ((a != a) & (b != b))).all()
        assert same, f"{what}: tensor {i} differs by {(a.double() - b.double()).abs().max():.3g}"


def anatomy(model: nn.Module) -> list[tuple]:
    """Names, identities, classes, modes, attributes and tensors of all modules."""
    return [
        (name, id(m), type(m), m.training, sorted(vars(m)), [(k, id(v)) for k, v in m._modules.items()])
        for name, m in model.named_modules()
    ]


_COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def _possible_copies(model: nn.Module) -> list[str]:
    """The ways in which the float network can be copied: closures as hooks and parametrizations rule out some."""
    possible = []
    for how, copied in _COPIES.items():
        try:
            copied(model)
        except Exception:
            continue
        possible.append(how)
    return possible


def check_report(trial: Trial, report: QuantizeReport) -> None:
    """That what is reported is what runs, with an alpha for each place."""
    runs = dict.fromkeys((replaced.name for replaced in report.replaced), 0)
    for training in MODES:
        mode = "train" if training else "eval"
        left = trial.relus(training)
        assert left == 0, f"{mode}: {left} relus still execute; skipped: {report.skipped}"
        ran, _ = trial.qrelus(training)
        ways = {(execution.name, execution.behind) for execution in ran}
        several = sorted(name for name, count in Counter(name for name, _ in ways).items() if count > 1)
        assert not several, f"{mode}: one alpha behind several modules: {several}"
        counts = Counter(execution.name for execution in ran)
        runs |= {name: max(count, runs.get(name, 0)) for name, count in counts.items()}
    reported = {replaced.name: replaced.runs for replaced in report.replaced}
    wrong = {name: (reported.get(name), count) for name, count in runs.items() if reported.get(name) != count}
    assert not wrong, f"(runs reported, runs) of QReLUs: {wrong}"


def set_alphas(trial: Trial) -> None:
    """Different ones, of the size of the inputs."""
    for training in reversed(MODES):
        for i, (_, layer, largest, _) in enumerate(trial.qrelus(training)[0]):
            if 0 < largest < float("inf"):
                layer.alpha.data.fill_(largest * (0.5 + 0.03 * (i % 16)) / (2**BITS - 1))


def _staircase(layer: cg.QReLU) -> Callable[[Tensor], Tensor]:
    alpha, settings = layer.alpha.detach().clone(), layer.settings()
    return lambda x: cg.qrelu(x, alpha, BITS, **settings)


def check(specimen: zoo.Specimen) -> None:
    """All that a conversion promises, of one network."""
    trial, model = Trial(specimen), specimen.model
    in_float = {training: trial.outputs(training) for training in MODES}
    copies = _possible_copies(model)
    before, buffers = anatomy(model.eval()), {name: buffer.clone() for name, buffer in model.named_buffers()}

    report = cg.quantize_(model, BITS, example_inputs=specimen.inputs)

    now = dict(model.named_buffers())
    assert_same([now[name] for name in buffers], list(buffers.values()), "buffers that the conversion should leave")
    assert not any(module.training for module in model.modules()), "the conversion leaves the network in train mode"
    check_report(trial, report)
    set_alphas(trial)
    ran, converted = zip(*(trial.qrelus(training) for training in MODES))
    staircases = [[_staircase(execution.layer) for execution in executions] for executions in ran]
    wanted = trial.outputs(False)  # without a graph: what a model remembers of a forward can then be copied
    for how in copies:
        assert_same(trial.outputs(False, _COPIES[how](model)), wanted, how)
    plain = trial.gradients()
    with cg.packed_activations():
        packed = trial.gradients()
    assert plain.keys() == packed.keys()
    assert_same(list(packed.values()), list(plain.values()), "packed gradients")

    model.eval()
    report.undo()

    assert anatomy(model) == before, "undo leaves something behind"
    for training in MODES:
        assert_same(trial.outputs(training), in_float[training], "undo")
        assert_same(converted[training], trial.with_staircases(training, staircases[training]), "the oracle")
    wanted = trial.gradients(staircases[True])
    assert_same([plain[name] for name in wanted], list(wanted.values()), "gradients of the oracle")


def _is_sampled(name: str) -> bool:
    return zlib.crc32(name.encode()) % 64 == 45  # ten, all of which can be built


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if _is_sampled(n) else pytest.mark.slow) for n in zoo.architectures()]
)
def test_architecture(name):
    try:
        specimen = zoo.build(name, lambda model, inputs: relus_executed(model, inputs) > 0)
    except zoo.Unbuildable as why:
        pytest.skip(str(why))
    if not relus_executed(specimen.model, specimen.inputs):
        pytest.skip("no relu executes")
    check(specimen)
