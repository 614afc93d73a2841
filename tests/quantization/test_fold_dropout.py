"""`quantize_(model, fold_dropout=True)`: where a QReLU takes over the dropout after it, and where it must not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import Kept
from torch import nn
from transformer_models import built, gradients, logits, t5

import coarsegrad as cg


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(24, 96), nn.Linear(96, 24)
        self.act, self.dropout = nn.ReLU(), nn.Dropout(0.5)


class Assigned(Base):
    def forward(self, x):
        h = self.wi(x)
        h = self.act(h)
        h = self.dropout(h)
        return self.wo(h)


class Nested(Base):
    def forward(self, x):
        return self.wo(self.dropout(self.act(self.wi(x))))


class Returned(Base):
    def inner(self, x):
        if x.numel():
            h = F.relu(self.wi(x))
            return self.dropout(h)
        return x

    def forward(self, x):
        return self.wo(self.inner(x))


class Function(Base):
    def forward(self, x):
        return self.wo(self.dropout(torch.relu(self.wi(x))))


class AttributeThatIsAFunction(Nested):
    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.relu


def sequential():
    return nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 24))


class TwoSites(Base):
    """Each call of self.act gets a QReLU of its own, and one of them the dropout."""

    def forward(self, x):
        h = self.act(self.wi(x))
        return self.wo(self.dropout(self.act(h)))


FOLDED = [Assigned, Nested, Returned, Function, AttributeThatIsAFunction, sequential, TwoSites]


class ReadBefore(Base):
    def forward(self, x):
        h = self.act(self.wi(x))
        y = self.dropout(h)
        return self.wo(y + h)


class UsedTwice(Base):
    def forward(self, x):
        return self.dropout(self.wo(self.dropout(self.act(self.wi(x)))))


class HandedOn(Base):
    def forward(self, x):
        for part in (self.wi, self.act):
            x = part(x)
        return self.wo(self.dropout(self.act(x)))


class DropoutHandedOn(Base):
    def forward(self, x):
        x = self.dropout(self.act(self.wi(x)))
        return nn.Sequential(self.wo, self.dropout)(x)


class SomethingBetween(Base):
    def forward(self, x):
        h = self.act(self.wi(x))
        h = h + 1
        h = self.dropout(h)
        return self.wo(h)


class OtherBranch(Base):
    def forward(self, x):
        h = self.act(self.wi(x))
        if self.training:
            h = self.dropout(h)
        return self.wo(h)


class Subclass(Nested):
    def __init__(self):
        super().__init__()
        self.dropout = type("Dropout", (nn.Dropout,), {})(0.5)


class Hooked(Nested):
    def __init__(self):
        super().__init__()
        self.dropout.register_forward_hook(lambda *_: None)


class Certain(Nested):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(1.0)


class InPlace(Base):
    """What is added last is the activation's output."""

    def forward(self, x):
        h = self.wi(x)
        return self.wo(self.dropout(F.relu(h, inplace=True)) + h)


NOT_FOLDED = [
    InPlace, ReadBefore, UsedTwice, HandedOn, DropoutHandedOn, SomethingBetween, OtherBranch, Subclass, Hooked, Certain,
]  # fmt: skip


def dropouts(model):
    return [m for m in model.modules() if isinstance(m, nn.Dropout)]


def outputs(model, x):
    torch.manual_seed(3)
    return model(x)


X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", FOLDED)
def test_folded_it_is_the_same_network(make):
    """With p = 1/2 to the bit: the same random numbers drop the same elements."""
    torch.manual_seed(0)
    model = make()
    before, dropout = outputs(model, X), dropouts(model)[0]
    apart, folded = copy.deepcopy(model), model
    cg.quantize_(apart, 2, ste="relu", alpha=0.25)
    report = cg.quantize_(folded, 2, fold_dropout=True, ste="relu", alpha=0.25)
    assert not dropouts(folded) and dropouts(apart)
    assert sum("p=0.5" in r.note for r in report.replaced) == 1 and "p=0.5" in str(report)
    assert [m.dropout for m in folded.modules() if isinstance(m, cg.QReLU) and m.dropout] == [0.5]
    for training in (True, False):
        want, got = outputs(apart.train(training), X), outputs(folded.train(training), X)
        assert torch.equal(got, want)
        mine, theirs = (
            torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((got, folded), (want, apart))
        )
        assert all(map(torch.equal, mine, theirs))
    assert not torch.equal(outputs(folded.train(), X), outputs(folded.eval(), X))
    for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(outputs(twin.train(), X), outputs(folded.train(), X))
    assert folded.state_dict().keys() == apart.state_dict().keys()
    report.undo()
    assert dropouts(model) == [dropout]
    assert torch.equal(outputs(model, X), before)


@pytest.mark.parametrize("make", NOT_FOLDED)
def test_what_is_not_folded(make):
    model = make()
    want = dropouts(model)
    report = cg.quantize_(model, 2, fold_dropout=True)
    assert dropouts(model) == want
    assert all(m.dropout == 0 for m in model.modules() if isinstance(m, cg.QReLU))
    why = {Certain: "dropout must be", InPlace: "the activation is in place"}.get(make)
    assert [why] * bool(why) == [why for r in report.replaced if f"dropout is not folded: {why}" in r.note]


def test_it_is_not_done_unasked_and_has_no_rate_of_its_own():
    model = Nested()
    cg.quantize_(model, 2)
    assert len(dropouts(model)) == 1
    with pytest.raises(TypeError, match="dropout cannot be set for all QReLUs: .*fold_dropout=True"):
        cg.quantize_(Nested(), 2, dropout=0.1)


def test_an_ste_with_a_gradient_at_zero_keeps_the_dropout_apart():
    model = Nested()
    report = cg.quantize_(model, 2, ste="identity", fold_dropout=True)
    assert len(dropouts(model)) == 1
    assert "dropout is not folded: dropout needs an STE without a gradient at 0" in report.replaced[0].note


@pytest.mark.parametrize(
    "ste, rounding, bits_kept", [("relu", "hwgq", 2), ("relu", "nearest", 3), ("clipped_relu", "nearest", 3)]
)
def test_t5(ste, rounding, bits_kept):
    """The feed-forward blocks of transformers' T5 keep b or b + 1 bits for an element of wi's output."""
    model, batch = built(t5)
    cg.quantize_(model, 2, ste=ste, rounding=rounding, fold_dropout=True)
    blocks = [m for m in model.modules() if type(m).__name__ == "T5DenseActDense"]
    assert len(blocks) == 4 and all(type(block.dropout) is nn.Identity for block in blocks)
    x = torch.randn(8, 16, 32)
    block = blocks[0].train()
    with Kept(*block.parameters(), *block.buffers(), x) as kept, cg.packed_activations():
        y = block(x)
    assert kept.bytes == 8 * 16 * 64 * bits_kept // 8 + 4, "and alpha"
    with cg.packed_activations():
        assert cg.saved_memory(block, x).total == kept.bytes
    y.sum().backward()
    cg.calibrate(model, [batch], progress=False)
    assert logits(model, batch).isfinite().all()
    want = gradients(model, batch)
    with cg.pack_activations_(model):
        got = gradients(model, batch)
    assert all(torch.equal(got[name], want[name]) for name in want)
