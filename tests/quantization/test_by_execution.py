"""quantize_(model, example_inputs=...): every relu that runs, whoever calls it, and an alpha for each run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from relu_forms import COUNTS, Loop, LoopAndCheckpoint, LoopAndFunction, LoopAndMethod, Nested, StoredLambda
from test_surgery import qrelus
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg

BITS = 3
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


class Staircases(TorchFunctionMode):
    """Written apart from the package's own: the float model with its i-th relu made the i-th staircase."""

    def __init__(self, alphas, squares=()) -> None:
        super().__init__()
        self.alphas, self.count = list(alphas), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        x = next((t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor) and t.dim() > 1), None)
        name = getattr(function, "__name__", "").replace("aten::", "").strip("_").split(".")[0]
        if name in ("relu", "clamp", "clamp_min", "maximum", "hardtanh", "threshold", "leaky_relu"):
            y = cg.qrelu(x, self.alphas[self.count], BITS, rounding="nearest")
            self.count += 1
        return y


def made(cls, seed=0):
    torch.manual_seed(seed)
    return cls()


def converted(cls, **settings):
    model = made(cls)
    report = cg.quantize_(model, BITS, example_inputs=X, **settings)
    for i, qrelu in enumerate(qrelus(model).values()):
        with torch.no_grad():
            qrelu.alpha.fill_(0.05 + 0.03 * i)
    return model, report


def alphas_in_order(model):
    """Those of the QReLUs as they run."""
    found = []
    hooks = [m.register_forward_pre_hook(lambda m, _: found.append(m.alpha.item())) for m in qrelus(model).values()]
    with torch.no_grad():
        model(X)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("cls", COUNTS, ids=lambda cls: cls.__name__)
class TestEveryForm:
    def test_none_is_left_and_each_run_is_what_the_report_says(self, cls):
        model, report = converted(cls)
        count, runs = COUNTS[cls]
        assert report.executed and not report.skipped
        names = [r.name for r in report.replaced]
        assert [n for n, m in model.named_modules() if isinstance(m, cg.QReLU)].sort() == names.sort()
        assert len(names) == len(set(names)) == count
        assert [r.runs for r in report.replaced] == [runs] * count
        assert len(alphas_in_order(model)) == count * runs
        assert ("runs in a forward" in str(report)) == (runs > 1) and "Only the source" not in str(report)

    def test_it_computes_the_float_model_with_staircases_for_relus(self, cls):
        model, _ = converted(cls)
        alphas = alphas_in_order(model)
        for training in (False, True):
            with torch.no_grad(), Staircases(alphas) as oracle:
                want = made(cls).train(training)(X)
            assert oracle.count == len(alphas)
            assert torch.equal(model.train(training)(X), want)

    def test_undo_is_exact(self, cls):
        model = made(cls)
        want = model(X)
        before = [(n, id(m), type(m)) for n, m in model.named_modules()]
        attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
        report = cg.quantize_(model, BITS, example_inputs=X)
        assert not torch.equal(model(X), want)
        report.undo()
        assert torch.equal(model(X), want)
        assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
        for name, module in model.named_modules():
            assert vars(module).keys() == attributes[name].keys()
            assert all(vars(module)[a] is v for a, v in attributes[name].items() if isinstance(v, (list, dict)))

    def test_copies_and_pickles_compute_the_same(self, cls):
        model, _ = converted(cls)
        with torch.no_grad():  # one keeps its input
            want = model(X)
        twins = [copy.deepcopy(model)]
        if cls is not StoredLambda:
            twins.append(pickle.loads(pickle.dumps(model)))
        for twin in twins:
            assert torch.equal(twin(X), want)
            assert all(qrelus(twin)[name] is not qrelus(model)[name] for name in qrelus(model))

    def test_once_more_changes_nothing(self, cls):
        model, _ = converted(cls)
        modules, want = list(model.named_modules()), model(X)
        again = cg.quantize_(model, BITS + 1, example_inputs=X)
        assert not again.replaced and list(model.named_modules()) == modules and torch.equal(model(X), want)

    def test_every_alpha_learns(self, cls):
        model, _ = converted(cls, learn_alpha=True, alpha_grad="exact")
        model(X + 0.5).sum().backward()
        assert all(qrelu.alpha.grad is not None for qrelu in qrelus(model).values())


@pytest.mark.parametrize("cls", [Loop, LoopAndFunction, LoopAndMethod, Nested], ids=lambda cls: cls.__name__)
def test_compiled_and_exported(cls):
    """What chooses the QReLU is Python that is gone once it is traced."""
    model, _ = converted(cls, learn_alpha=True)
    want = model(X)
    names, values = zip(*model.named_parameters())
    grads = torch.autograd.grad(want.sum(), values)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (X,)).module()
    for other in (compiled(X), exported(X)):
        assert torch.equal(other, want)
    assert all(map(torch.equal, torch.autograd.grad(compiled(X).sum(), values), grads))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_recompute_with_the_same_alpha(use_reentrant):
    class Checkpointed(LoopAndCheckpoint):
        def forward(self, x):
            for linear in self.layers:
                x = checkpoint(self.layer, x, linear, use_reentrant=use_reentrant)
            return x

    plain, checkpointed = converted(LoopAndMethod)[0], converted(Checkpointed)[0]
    x = X.clone().requires_grad_()
    want, got = plain(x), checkpointed(x)
    assert torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_a_forward_of_another_length_keeps_the_alphas_of_its_turns():
    model, _ = converted(Loop)
    first = [qrelu.alpha.item() for qrelu in qrelus(model).values()]
    assert alphas_in_order(model) == first
    del model.layers[2]
    assert alphas_in_order(model) == first[:2]
    model.layers.extend([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert alphas_in_order(model) == [*first, first[0]], "an unknown turn has the first one's"


class Both(nn.Module):
    """Other relus in training than in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.norm(self.linear(x))
        return layer_of_training(x) if self.training else F.relu(x)


def layer_of_training(x):
    return torch.relu(x - 0.5)


def test_both_modes_are_run_and_nothing_is_left_behind():
    model = made(Both).train()
    model.norm.eval()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    report = cg.quantize_(model, BITS, example_inputs={"x": X})
    assert len(report.replaced) == 2 and not report.skipped and [r.runs for r in report.replaced] == [1, 1]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and not model.norm.training and all("forward" not in vars(m) for m in model.modules())


def test_relus_of_scores_are_pointed_out():
    """As those of an indexer, which chooses what is attended to."""

    class Scores(Both):
        def forward(self, x):
            scores = F.relu(self.linear(x) @ x.transpose(0, 1) * 0.5)
            return F.relu(x @ self.linear.weight.t()) + scores.mean()

    report = cg.quantize_(made(Scores), example_inputs=X)
    assert ["attention scores" in r.note for r in report.replaced] == [True, False]


def test_a_bound_of_what_no_weight_is_part_of_is_no_activation():
    """As the weights of an interpolation."""

    class Interpolates(Both):
        def forward(self, x):
            weights = (1 - torch.linspace(-2, 2, 16).view(4, 4).abs()).clamp(min=0)
            return torch.maximum(self.linear(x), torch.zeros(())) @ weights

    model = made(Interpolates)
    report = cg.quantize_(model, example_inputs=X)
    assert [r.was.split()[0] for r in report.replaced] == ["maximum"] and not report.skipped


def test_what_is_not_reached_is_reported():
    class Branches(Both):
        def forward(self, x, other=False):
            return F.relu(x) if other else torch.relu(self.linear(x))

    report = cg.quantize_(made(Branches), example_inputs=(X,))
    assert sorted(r.runs for r in report.replaced) == [0, 1] and str(report).count("not reached") == 1


def test_a_mode_that_cannot_be_run_is_reported():
    report = cg.quantize_(made(Both), example_inputs=X[:1])
    assert "Not run in training mode" in str(report) and "more than 1 value per channel" in report.not_run


def test_filter_fn_leaves_what_runs_and_the_report_says_so():
    model = made(Both)
    report = cg.quantize_(model, example_inputs=X, filter_fn=lambda module, name: name == "qrelu")
    assert [r.name for r in report.replaced] == ["qrelu"]
    assert [(s.name, s.why) for s in report.skipped] == [("layer_of_training", "filter_fn excludes it")]


def test_inputs_that_do_not_fit_change_nothing():
    model = made(Both)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cg.quantize_(model, example_inputs=X[:, :2])
    assert type(model) is Both and not qrelus(model)


def test_a_conversion_that_computes_something_else_is_undone_and_refused():
    class Doubles(nn.ReLU):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = nn.Sequential(nn.Linear(4, 4), Doubles())
    want = model(X)
    with pytest.raises(RuntimeError, match="computes something else than before, in evaluation mode"):
        cg.quantize_(model, example_inputs=X)
    assert type(model[1]) is Doubles and torch.equal(model(X), want)


def test_a_call_that_is_not_a_relu_alone_stays():
    class Capped(nn.Module):
        def forward(self, x):
            return capped(x)

    model = nn.Sequential(nn.ReLU(), Capped())
    report = cg.quantize_(model, example_inputs=X)
    assert [r.name for r in report.replaced] == ["0"]
    assert [s.why for s in report.skipped] == ["what is called there is not just a relu"]


namespace = {"F": F}
exec("def capped(x):\n    return F.relu(x).clamp(max=0.5)\n", namespace)
capped = namespace["capped"]
