"""packed_activations in the graphs of torch.compile: the codes are saved, and every gradient has the same bits."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch._dynamo.testing
from packing_cases import CASES, assert_same, build, gradients, kept_bytes, packed_forward
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad.packing import graphs

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def kept_of(model, forward):
    return kept_bytes(forward, *model.parameters(), *model.buffers())[0]


# --------------------------------------------------------------------------------- gradients and bytes saved

SETTINGS = {
    "relu": {"ste": "relu"},
    "clipped_relu": {"ste": "clipped_relu"},
    "relu, nearest": {"ste": "relu", "rounding": "nearest"},
    "identity": {"ste": "identity"},
    "trust": {"ste": "trust", "rounding": "nearest"},
    "trust, three_valued": {"ste": "trust", "learn_alpha": True},
    "trust, exact": {"ste": "trust", "learn_alpha": True, "alpha_grad": "exact"},
    "dsq": {"ste": "dsq"},
    "reverse_exponential": {"ste": "reverse_exponential"},
    "step": {"ste": "reverse_exponential_step"},
    "exact": {"learn_alpha": True, "alpha_grad": "exact"},
    "three_valued": {"learn_alpha": True, "bits": 3},
    "chain": {"learn_alpha": True, "alpha_grad": "chain", "rounding": "nearest", "alpha_scale": "lsq"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_networks(case, dtype):
    """Packed as in eager code, but for the copies of alpha, which compiled code saves as it does a weight."""
    model, x = build(case, dtype, ste="relu")
    run = compiled(model)
    want = gradients(run, x)
    assert_same(gradients(run, x, cg.packed_activations()), want)
    saved, whole = kept_of(model, lambda: packed_forward(run, x)), kept_of(model, lambda: run(x))
    eager = kept_of(model, lambda: packed_forward(model, x))
    assert saved < whole and saved <= eager


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings):
    model, x = build("mlp", **SETTINGS[settings])
    run = compiled(model)
    want = gradients(run, x)
    assert_same(gradients(run, x, cg.packed_activations()), want)
    copies_of_alpha = 4 * sum(isinstance(m, cg.QReLU) for m in model.modules())
    eager = kept_of(model, lambda: packed_forward(model, x))
    assert kept_of(model, lambda: packed_forward(run, x)) == eager - copies_of_alpha


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_compilers(backend):
    """A graph of decompositions, and the default compiler."""
    model, x = build("mlp", ste="relu")
    run = compiled(model, backend)
    want = gradients(run, x)
    assert_same(gradients(run, x, cg.packed_activations()), want)
    whole, packed = kept_of(model, lambda: run(x)), kept_of(model, lambda: packed_forward(run, x))
    outputs = [9 * 37, 9 * 23]
    assert whole - packed == sum(4 * n + -(-n // 8) - -(-n // 4) for n in outputs)  # y and a mask, or codes of 2 bits


def test_default_partitioner():
    model, x = build("cnn")
    run = compiled(model, "aot_eager_default_partitioner")
    want = gradients(run, x)
    assert_same(gradients(run, x, cg.packed_activations()), want)
    assert kept_of(model, lambda: packed_forward(run, x)) < kept_of(model, lambda: run(x))


def test_one_graph_for_all_batches():
    activation = cg.QReLU(2, ste="relu", alpha=0.25)
    model = nn.Sequential(nn.Linear(16, 32), activation, nn.Linear(32, 8))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(model, counter, dynamic=True)
    for batch in (3, 5, 8):
        x = torch.randn(batch, 4, 16, requires_grad=True)
        loss = gradients(run, x, cg.packed_activations())["loss"]
        torch.testing.assert_close(loss, gradients(model, x)["loss"])
        assert kept_of(model, lambda: packed_forward(run, x)) == x.numel() * 4 + batch * 4 * 32 // 4
    assert counter.frame_count == 1


def test_alpha_and_train_and_eval_recompile_no_more_than_relu():
    model, x = build("mlp")
    relus = nn.Sequential(*(nn.ReLU() if isinstance(m, cg.QReLU) else m for m in model))
    counters = []
    for network in (model, relus):
        counters.append(torch._dynamo.testing.CompileCounterWithBackend("aot_eager"))
        run = compiled(network, counters[-1])
        for alpha in (0.25, 0.5):
            for module in network.modules():
                if isinstance(module, cg.QReLU):
                    module.alpha.fill_(alpha)
            for mode in (True, False):
                network.train(mode)
                gradients(run, x, cg.packed_activations())
    assert counters[0].frame_count == counters[1].frame_count


def views_and_squares(y):
    a, b = y.view(4, 2, 6).unbind(1)
    return torch.stack([a @ b.t(), (y.square() @ y.t())[:4, :4], (y * y).t()[:4] @ y[:, :4]])


def test_views_copies_and_squares():
    x, alpha = torch.randn(8, 6, requires_grad=True), torch.tensor([0.3])
    weight = torch.randn(6, 5, requires_grad=True)

    def function(x):
        y = cg.qrelu(x, alpha, 2, ste="relu")
        return views_and_squares(y).sum() + (y.to(torch.bfloat16) @ weight.to(torch.bfloat16)).sum()

    with cg.packed_activations():
        run = compiled(function)
        saved = kept_bytes(lambda: run(x), x, weight, alpha)[0]
        got = torch.autograd.grad(run(x), [x, weight])
    assert all(map(torch.equal, got, torch.autograd.grad(compiled(function)(x), [x, weight])))
    assert saved == 12 + 6 * 5 * 2  # the codes of 48 elements, and the weight in bfloat16


def test_autocast():
    model, x = build("mlp", ste="relu")
    run = compiled(model)

    def step(block):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(run, x, block)

    want = step(None)
    assert_same(step(cg.packed_activations()), want)


def test_in_place():
    model, x = build("cnn", inplace=True)
    run = compiled(model)
    want = gradients(run, x)
    assert_same(gradients(run, x, cg.packed_activations()), want)
    assert kept_of(model, lambda: packed_forward(run, x)) < kept_of(model, lambda: run(x))
    refused = compiled(lambda x: cg.qrelu(x + 1, 0.5, 2, ste="reverse_exponential", inplace=True))
    with cg.packed_activations(), pytest.raises(Exception, match="inplace=True would overwrite x"):
        refused(x)


def test_written_to_after_the_staircase():
    """What was written to is another tensor, and saved whole."""
    x, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def function(x):
        y = cg.qrelu(x, 0.3, 2, ste="relu")
        y.mul_(3)
        return (y @ weight).sum()

    run = compiled(function)
    want = torch.autograd.grad(function(x), [x, weight])
    with cg.packed_activations():
        assert all(map(torch.equal, torch.autograd.grad(run(x), [x, weight]), want))


def test_frozen_layers_save_no_codes():
    model, x = build("mlp")
    for layer in (model[2], model[4]):
        layer.requires_grad_(False)
    run = compiled(model)
    assert kept_of(model, lambda: packed_forward(run, x)) == kept_of(model, lambda: run(x))


def test_in_place_on_a_transposed_tensor():
    """What was written to keeps its strides, which y has not: it is saved whole."""
    x, weight = torch.randn(8, 6, requires_grad=True), torch.randn(48, requires_grad=True)

    def function(x):
        y = cg.qrelu((x * 1).t(), 0.3, 2, ste="relu", inplace=True)
        return (y.t().view(-1) * weight).sum()

    want = torch.autograd.grad(function(x), [x, weight])
    with cg.packed_activations():
        assert all(map(torch.equal, torch.autograd.grad(compiled(function)(x), [x, weight]), want))


def test_checkpoint():
    """What is computed again saves nothing, and is not rebuilt from codes on top of that."""
    model, x = build("mlp", ste="relu")
    recorded = torch._dynamo.testing.AotEagerAndRecordGraphs()
    run = compiled(lambda x: checkpoint(model, x, use_reentrant=False), recorded)
    found = []
    for block in (None, cg.packed_activations()):
        model.zero_grad()
        x.grad = None
        with block or torch.enable_grad():
            loss = run(x).square().sum()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad.clone()})
    assert_same(*found)
    assert kept_of(model, lambda: packed_forward(run, x)) == kept_of(model, lambda: run(x))
    whole, packed = recorded.bw_graphs
    assert "coarsegrad.dequantize" not in packed.code and "coarsegrad.qrelu_forward." in packed.code


def test_output_of_the_graph():
    """y is returned and read by the backward: both get it."""
    layer = nn.Linear(6, 4)

    def function(x):
        y = cg.qrelu(x, 0.3, 2, ste="relu")
        return y, layer(y)

    x = torch.randn(8, 6, requires_grad=True)
    with cg.packed_activations():
        y, z = compiled(function)(x)
    assert torch.equal(y, function(x)[0])
    assert torch.equal(torch.autograd.grad(z.sum() + y.sum(), layer.weight)[0], torch.ones(8, 4).t() @ y)


# --------------------------------------------------------------------------------------------- where a block is


def test_blocks_inside_and_around():
    """A block inside the compiled function, one around it, a model that packs itself, and none: each its own graph."""
    model, x = build("mlp", ste="relu")

    def inside(x):
        with cg.packed_activations():
            return model(x)

    around, without = compiled(model), compiled(model)
    whole, packed = kept_of(model, lambda: without(x)), kept_of(model, lambda: packed_forward(around, x))
    assert packed < whole
    assert kept_of(model, lambda: around(x)) == whole
    assert kept_of(model, lambda: compiled(inside)(x)) == packed
    torch._dynamo.reset()  # the hooks of a module that is compiled already are ignored, as always
    with cg.pack_activations_(model):
        assert kept_of(model, lambda: compiled(model)(x)) == packed


def test_a_compiled_model_that_packs_itself():
    """The hooks of a class that is not torch's run outside of the graph of its forward."""
    model, x = build("opt", ste="relu")
    packed = kept_of(model, lambda: packed_forward(compiled(model), x))
    torch._dynamo.reset()
    with cg.pack_activations_(model):
        assert kept_of(model, lambda: compiled(model)(x)) == packed
        assert graphs.open_blocks.here.count == 0


def test_a_compiled_block_of_an_eager_model():
    model, x = build("opt", ste="relu")
    want = gradients(model, x)
    saved = kept_of(model, lambda: packed_forward(model, x))
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, x, cg.packed_activations()), want)
    assert kept_of(model, lambda: packed_forward(model, x)) <= saved


def test_a_block_applies_to_its_own_thread():
    model, x = build("mlp", ste="relu")
    run = compiled(model)
    whole = kept_of(model, lambda: run(x))
    found = []
    with cg.packed_activations():
        packed = kept_of(model, lambda: run(x))
        thread = threading.Thread(target=lambda: found.append(kept_of(model, lambda: run(x))))
        thread.start()
        thread.join()
    assert found == [whole] and packed < whole


def test_an_error_in_a_block_closes_it():
    with pytest.raises(ZeroDivisionError), cg.packed_activations():
        raise ZeroDivisionError
    assert graphs.open_blocks.here.count == 0


def test_export_ignores_a_block():
    model, x = build("mlp")
    with cg.packed_activations():
        program = torch.export.export(model, (x.detach(),))
    assert "qrelu_packed" not in str(program.graph) and "coarsegrad.qrelu." in str(program.graph)


# ------------------------------------------------------------------------------------------------ the pass itself


def test_a_pass_of_the_user_runs_too():
    seen = []

    def own(module, *args):
        seen.append(module)
        return module

    model, x = build("mlp")
    run = compiled(model)
    with torch._functorch.config.patch(joint_custom_pass=own):
        assert kept_of(model, lambda: packed_forward(run, x)) < kept_of(model, lambda: model(x)) and len(seen) == 1


def test_a_graph_without_the_pass_says_so_once(monkeypatch):
    monkeypatch.setattr(graphs, "_warned", False)
    model, x = build("mlp")
    run = compiled(model, "eager")
    want = gradients(run, x)
    with pytest.warns(UserWarning, match='no effect in a graph.*backend="eager".*saved whole') as caught:
        assert_same(gradients(run, x, cg.packed_activations()), want)
    assert sum("packed_activations" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(run, x, cg.packed_activations())


def test_under_vmap_and_grad_of_torch_func():
    x = torch.randn(3, 8)
    gradient = torch.func.vmap(torch.func.grad(lambda x: cg.qrelu(x, 0.3, 2).square().sum()))
    want = gradient(x)

    def inside(x):
        with cg.packed_activations():
            return gradient(x)

    assert torch.equal(compiled(inside)(x), want)
