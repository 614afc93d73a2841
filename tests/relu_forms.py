"""Networks that call a relu in all the ways that people write it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TABLE = {"relu": F.relu, "tanh": torch.tanh}
MODULES = {"relu": nn.ReLU()}
stored = lambda x: F.relu(x)  # noqa: E731


def helper(x):
    return F.relu(x)


def through_another(x):
    return helper(x) - 0.25


def layer(x, linear):
    return F.relu(linear(x))


def forwards(function):
    """A wrapper with another reference to what it wraps, as those that choose an implementation."""
    implementation = function

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return implementation(*args, **kwargs) if kwargs or args else function()

    return wrapper


@forwards
@forwards
def wrapped_helper(x):
    return MODULES["relu"](x) - 0.25


class Twice(nn.Module):
    """`act` runs twice, behind different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x)) - 0.1))


class Clamp(Twice):
    def act(self, x):
        return x.clamp(min=0)


class ClampMin(Twice):
    def act(self, x):
        return torch.clamp_min(x, 0)


class Maximum(Twice):
    def act(self, x):
        return torch.maximum(torch.zeros(()), x)


class OfTensor(Twice):
    def act(self, x):
        return torch.Tensor.relu(x)


class Keyword(Twice):
    def act(self, x):
        return F.relu(inplace=False, input=x)


class Flag(Twice):
    inplace = True

    def act(self, x):
        return F.relu(x, inplace=self.inplace)


class Starred(Twice):
    def act(self, *x):
        return F.relu(*x)


class Hardtanh(Twice):
    def act(self, x):
        return F.hardtanh(x, 0, 6)


class Threshold(Twice):
    def act(self, x):
        return F.threshold(x, 0, 0)


class LeakyRelu(Twice):
    def act(self, x):
        return F.leaky_relu(x, negative_slope=0.0)


class Aten(Twice):
    def act(self, x):
        return torch.ops.aten.relu(x)


class AtenOverload(Twice):
    def act(self, x):
        return torch.ops.aten.relu.default(x)


class GetAttribute(Twice):
    def act(self, x):
        return getattr(F, "re" + "lu")(x)


class FromATable(Twice):
    def act(self, x):
        return TABLE["relu"](x)


class ModuleFromATable(Twice):
    def act(self, x):
        return MODULES["relu"](x)


class MadeInForward(Twice):
    def act(self, x):
        return nn.ReLU()(x)


class Helper(Twice):
    def act(self, x):
        return helper(x)


class ThroughAnother(Twice):
    def act(self, x):
        return through_another(x)


class WrappedHelper(Twice):
    def act(self, x):
        return wrapped_helper(x)


class WrappedMethod(Twice):
    @forwards
    def inner(self, x):
        return F.relu(x)

    def act(self, x):
        return self.inner(x)


class Stored(Twice):
    def act(self, x):
        return stored(x)


class Local(Twice):
    def act(self, x):
        function = F.relu
        return function(x)


class Private(Twice):
    def act(self, x):
        self.__x = x
        return F.relu(self.__x)


class CheckpointedHelper(Twice):
    def act(self, x):
        return checkpoint(helper, x, use_reentrant=False)


class CheckpointedLambda(Twice):
    def act(self, x):
        return checkpoint(lambda y: F.relu(y), x, use_reentrant=False)


class CheckpointedMethod(Twice):
    def act(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x):
        return F.relu(x)


class HandedOn(Twice):
    def act(self, x):
        return self.run(F.relu, x)

    def run(self, function, x):
        return function(x)


class Static(Twice):
    @staticmethod
    def inner(x):
        return F.relu(x)

    def act(self, x):
        return self.inner(x)


class Property(Twice):
    @property
    def act(self):
        return F.relu


class Plain(Twice):
    def act(self, x):
        return F.relu(x)


class Super(Plain):
    def act(self, x):
        return super().act(x) * 2


class Partial(Twice):
    def prepare(self):
        self.act = functools.partial(F.relu, inplace=True)


class StoredLambda(Twice):
    def prepare(self):
        self.act = stored


class InAList(Twice):
    def prepare(self):
        self.functions = [torch.tanh, F.relu]

    def act(self, x):
        return self.functions[1](x)


class Module(Twice):
    def prepare(self):
        self.act = self.made()

    made = nn.ReLU


class Subclass(nn.ReLU):
    pass


class SubclassWithForward(nn.ReLU):
    def forward(self, x):
        return F.relu(x, self.inplace)


class OfSubclass(Module):
    made = Subclass


class OfSubclassWithForward(Module):
    made = SubclassWithForward


class OfHardtanh(Module):
    def made(self):
        return nn.Hardtanh(0, 6)


class OfThreshold(Module):
    def made(self):
        return nn.Threshold(0, 0)


class OfLeakyReLU(Module):
    def made(self):
        return nn.LeakyReLU(0.0)


class Squared(Twice):
    def act(self, x):
        return F.relu(x).square_() + F.relu(x - 0.5).pow(exponent=2)


# ---------------------------------------------------------------------- one call, several times in a forward


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


class Methods(Layers):
    def layer(self, x, linear):
        return F.relu(linear(x)) - 0.1

    def forward(self, x):
        x = self.layer(self.layer(x, self.layers[0]), self.layers[1])
        return self.layer(x, linear=self.layers[2])


class Loop(Layers):
    def forward(self, x):
        for linear in self.layers:
            x = F.relu(linear(x)) - 0.1
        return x


class LoopAndModule(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        for i, linear in enumerate(self.layers):
            x = self.act(linear(x)) - 0.1 if i else linear(x)
        return x


class LoopAndMethod(Methods):
    def forward(self, x):
        for linear in self.layers:
            x = self.layer(x, linear)
        return x


class LoopAndFunction(Layers):
    def forward(self, x):
        for linear in self.layers:
            x = layer(x, linear)
        return x


class Comprehension(Layers):
    def forward(self, x):
        return sum([torch.relu(linear(x)) for linear in self.layers])


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            for linear in block:
                x = torch.relu(linear(x)) - 0.1
        return x


class LoopAndCheckpoint(Methods):
    def forward(self, x):
        for linear in self.layers:
            x = checkpoint(self.layer, x, linear, use_reentrant=False)
        return x


class OverTime(nn.Module):
    """A loop over time, behind one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(3):
            x = F.relu(self.cell(x)) - 0.1
        return x


class SharedBlock(nn.Module):
    """One block at three depths, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        for _ in range(3):
            x = self.block(x) - 0.1
        return x


class Mapped(Layers):
    def forward(self, x):
        return sum(map(F.relu, [linear(x) for linear in self.layers]))


# -------------------------------------------------------------------------------- held in several places


class InAPlainList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]
        for i, stage in enumerate(self.stages):
            self.add_module(str(i), stage)

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
        self.by_name = {"layers": (self.linear, self.act)}

    def forward(self, x):
        linear, act = self.by_name["layers"]
        return act(linear(x))


class BoundMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
        self.function, self.partial = self.act.forward, functools.partial(self.act)

    def forward(self, x):
        return self.function(self.linear(x)) + self.partial(x)


TWICE = [
    Clamp, ClampMin, Maximum, OfTensor, Keyword, Flag, Starred, Hardtanh, Threshold, LeakyRelu, Aten, AtenOverload,
    GetAttribute, FromATable, ModuleFromATable, MadeInForward, Helper, ThroughAnother, WrappedHelper,
    WrappedMethod, Stored, Local, Private,
    CheckpointedHelper, CheckpointedLambda, CheckpointedMethod, HandedOn, Static, Property, Super, Partial,
    StoredLambda, InAList, OfSubclass, OfSubclassWithForward, OfHardtanh, OfThreshold, OfLeakyReLU,
]  # fmt: skip
# QReLUs, and runs of each.
COUNTS = {cls: (2, 1) for cls in TWICE} | {
    Squared: (4, 1), Methods: (3, 1), Loop: (3, 1), LoopAndModule: (2, 1), LoopAndMethod: (3, 1),
    LoopAndFunction: (3, 1), Comprehension: (3, 1), Nested: (4, 1), LoopAndCheckpoint: (3, 1), OverTime: (1, 3),
    SharedBlock: (1, 3), Mapped: (1, 3), InAPlainList: (1, 1), InADict: (1, 1), BoundMethod: (1, 2),
}  # fmt: skip
