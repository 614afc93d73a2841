"""torch.compile and torch.export of converted models, also of those whose methods were rewritten."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from packing_cases import assert_same
from torch import nn
from transformer_models import FAMILIES, built, converted, gradients, logits, yolos

import coarsegrad as cg


@pytest.fixture(autouse=True)
def fresh_compiler(one_thread):
    torch.compiler.reset()


class Block(nn.Module):
    """As in a ResNet: one module called at two places, of which one is in place, and the function at two more."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, scale: float = 1.0):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) * scale
        y = self.relu(y + x)
        return F.relu(y - 0.1) ** 2 + y.relu()


def residual():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def rewritten():
    """(model, input); every QReLU is within a method that was compiled anew."""
    torch.manual_seed(0)
    model, x = residual(), torch.randn(4, 3, 12, 12)
    report = cg.quantize_(model, 4, ste="relu", learn_alpha=True)
    assert [r.name for r in report.replaced] == [
        f"{block}.{name}" for block in (1, 2) for name in ("relu", "relu_1", "qrelu", "qrelu_1")
    ]
    cg.calibrate(model, [x], progress=False)
    return model, x


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("family", ["opt", "t5", "resnet", "vit"])
def test_compile(family):
    """In one graph, with the eager gradients; dropout is off as its random numbers differ when compiled."""
    model, batch = converted(FAMILIES[family], layers=1, learn_alpha=True)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    want = gradients(model, batch)
    got = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled(model), batch).items()}
    assert any(name.endswith(".alpha") for name in got)
    assert_close(got, want)


def test_compile_of_rewritten_methods():
    model, x = rewritten()
    twin = copy.deepcopy(model)
    assert_close(step(compiled(model), x), step(twin, x))
    assert_close(model.state_dict(), twin.state_dict())  # BatchNorm's too


def test_compile_of_a_rewritten_head():
    model, _ = converted(yolos, learn_alpha=True)
    head, x = model.bbox_predictor, torch.randn(4, 3, 32)
    assert_close(step(compiled(head), x), step(copy.deepcopy(head), x))


@pytest.mark.parametrize("family", FAMILIES)
def test_export(family):
    model, batch = converted(FAMILIES[family], layers=1)
    labels = batch.pop("labels")
    if family == "t5":
        batch |= {"decoder_input_ids": labels, "use_cache": False}
    want = logits(model, batch)
    program = torch.export.export(model, (), batch)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("coarsegrad.qrelu" in target for target in targets) == len(
        [m for m in model.modules() if isinstance(m, cg.QReLU)]
    )
    assert not any("aten.relu" in target for target in targets)
    with torch.no_grad():
        assert torch.equal(program.module()(**batch).logits, want)


def test_export_of_rewritten_methods(tmp_path):
    model, x = rewritten()
    model.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in (x, torch.randn(7, 3, 12, 12)):
        torch.testing.assert_close(loaded(inputs), model(inputs))


def test_copies_and_files_of_rewritten_methods(tmp_path):
    model, x = rewritten()
    want = step(copy.deepcopy(model), x)
    torch.save(model, tmp_path / "model.pt")
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert isinstance(twin[1], Block) and twin[1] is not model[1]
        assert_same(step(twin, x), want)
    other, _ = built(lambda: (residual(), None))
    cg.quantize_(other, 4, ste="relu", learn_alpha=True)
    other.load_state_dict(model.state_dict())
    assert_same(step(other, x), want)
