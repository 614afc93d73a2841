"""Models without ReLU, converted by quantize_'s staircases: the same gradients packed and unpacked, and few bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
from block_models import FAMILIES, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, built, checkpoint, options
from saved_bytes import Kept
from transformer_models import gradients

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def converted(family, dtype=torch.float32, layers=2, **changed):
    model, batch = built(family, dtype, layers=layers)
    cg.quantize_(model, **{**options(family), **changed})
    return model, batch


def kept(model, batch):
    """Bytes kept for backward by a forward."""
    not_counted = [*model.parameters(), *model.buffers(), *batch.values()]
    with Kept(*not_counted) as counted:
        loss = model(**batch).loss
    assert loss.requires_grad
    return counted.bytes


# ------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", ["exact", "coarse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_packed(family, norms, dtype):
    model, batch = converted(family, dtype, norms=norms)
    model.train()
    whole, want = kept(model, batch), gradients(model, batch)
    checkpoint(model)
    checkpointed = gradients(model, batch)
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), checkpointed)
        checkpoint(model, False)
        assert_same(gradients(model, batch), want)
        assert kept(model, batch) < whole
    if family != "bert":  # there a norm and the layers that read it are in different checkpoints
        assert_same(checkpointed, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_gradient_is_the_models(family):
    """And does not change what the model computes, but for the order of sums."""
    model, batch = converted(family, norms=None)
    want = gradients(model, batch)
    other, _ = converted(family, norms="exact")
    got = gradients(other, batch)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-9)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast_and_reentrant_checkpoints(family):
    model, batch = converted(family)
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, batch)
        with cg.pack_activations_(model):
            assert_same(gradients(model, batch), want)
    checkpoint(model, use_reentrant=True)
    want = gradients(model, batch)
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), want)


@pytest.mark.parametrize("settings", [{"group": 16}, {"group": 16, "rotation": 16}])
def test_few_bits_in_groups(settings):
    model, batch = converted("llama", inputs={"bits": 4, **settings}, gates={"bits": 4, "group": 32})
    want = gradients(model, batch)
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), want)


def test_rotated_layers_compute_the_same():
    """Up to rounding: here 8 bits, whose stairs move with the rotation."""
    for family in ("llama", "gpt2"):
        model, batch = built(family)
        with torch.no_grad():
            want = model.eval()(**batch).logits
            cg.quantize_(model, inputs={"bits": 8, "rotation": 16})
            error = (model(**batch).logits - want).norm() / want.norm()
        assert error < 0.02


# ------------------------------------------------------------------------------------------ compiled


@pytest.mark.parametrize(
    "family, backend, changed",
    [
        ("llama", "aot_eager_decomp_partition", {"inputs": {"bits": 4, "group": 16, "rotation": 16}}),
        ("qwen3", "aot_eager", {"norms": "exact"}),
        ("bert", "aot_eager", {}),
    ],
)
def test_compiled(family, backend, changed):
    """The same gradients, packed as in eager code."""
    model, batch = converted(family, torch.bfloat16, layers=1, **changed)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch._dynamo.reset()
    want = gradients(torch.compile(model, backend=backend, fullgraph=True), batch)
    torch._dynamo.reset()
    with cg.pack_activations_(model):
        run = torch.compile(model, backend=backend, fullgraph=True)
        assert_same(gradients(run, batch), want)
        # Where heads share k and v, the graph keeps one of these whole too.
        assert kept(run, batch) <= 1.03 * kept(model, batch)
    torch._dynamo.reset()


def test_inductor():
    """One block, as code for the CPU takes long to compile."""
    model = built("llama", layers=1)[0].model.layers[0].mlp
    block = torch.nn.Sequential(torch.nn.RMSNorm(HIDDEN), model)
    cg.quantize_(block, inputs={"bits": 4, "group": 16, "rotation": 16}, gates=4, norms="coarse")
    x = torch.randn(8, HIDDEN, requires_grad=True)

    def grads():
        torch._dynamo.reset()
        with Kept(x, *block.parameters()) as counted:
            y = torch.compile(block, fullgraph=True)(x)
        kept = counted.bytes
        return torch.autograd.grad(y.square().sum(), [x, *block.parameters()]), kept

    want, whole = grads()
    with cg.pack_activations_(block):
        got, packed = grads()
    assert all(map(torch.equal, got, want)) and packed < 0.5 * whole
    torch._dynamo.reset()


def test_compiled_layers_of_an_eager_model():
    model, batch = converted("vit", layers=1)
    eager = gradients(model, batch)
    for layer in model.vit.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    want = gradients(model, batch)
    with cg.packed_activations():
        assert_same(gradients(model, batch), want)
    assert torch.equal(eager["loss"], want["loss"])
    torch._dynamo.reset()


def test_a_compiled_checkpoint():
    model, batch = converted("bert", layers=1)
    checkpoint(model)
    torch._dynamo.reset()
    with cg.pack_activations_(model):
        gradients(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ bytes


def _layer_of_llama(rows, element, bits, norms):
    """Bytes that a layer keeps: codes with an alpha per row, attention's output, and what the norms keep."""
    row = HIDDEN * bits // 8 + 2
    attention = (HEADS + 2 * KV_HEADS) * (16 + 2) + HIDDEN * element + 4 * HEADS
    norm = {None: 0, "coarse": 4, "exact": HIDDEN * element + 4}[norms]
    return rows * (3 * row + 2 * norm + attention + 2 * (INTERMEDIATE * bits // 8 + 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, norms", [(8, "exact"), (8, "coarse"), (4, "coarse")])
def test_bytes_of_a_layer(bits, norms, dtype):
    by_layers = []
    for layers in (1, 2):
        model, batch = converted("llama", dtype, layers, **options("llama", bits, norms))
        with cg.pack_activations_(model):
            by_layers.append(cg.saved_memory(lambda: model(**batch).loss).total)
    rows = batch["input_ids"].numel()
    assert by_layers[1] - by_layers[0] == _layer_of_llama(rows, dtype.itemsize, bits, norms)


@pytest.mark.parametrize(
    "changed, expected",
    [
        (None, 42.7),
        ({"norms": "coarse"}, 12.1),
        ({"norms": "exact"}, 16.1),
        ({"norms": "coarse", "bits": 4}, 8.0),
        ({"norms": "exact", "bits": 4}, 12.0),
    ],
)
def test_bytes_of_a_layer_of_smollm2s_shape(changed, expected):
    """Per feature and token, in bfloat16."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    by_layers = []
    for layers in (1, 2):
        model, batch = built("llama", torch.bfloat16, layers=layers, head_dim=64, **shape)
        if changed is not None:
            cg.quantize_(model, **options("llama", **changed))
            cg.pack_activations_(model)
        by_layers.append(cg.saved_memory(lambda: model(**batch).loss).total)
    assert (by_layers[1] - by_layers[0]) / (batch["input_ids"].numel() * 576) == pytest.approx(expected, abs=0.05)


class _Counter(TorchDispatchMode):
    """How often the signed staircase is computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ops = torch.ops.coarsegrad
        self.count += function is ops.qsigned_forward.default
        self.count += function is ops.norm_qsigned.default and args[7] is not None
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "family, each, outside",
    [
        ("llama", 8, 1),  # two norms, q, k, v, the output of attention, gate, up; the head
        ("gpt2", 7, 1),  # two norms, q, k, v, the output of attention, that of the activation; the head
        ("vit", 7, 2),  # ... ; patches, classifier
        ("bert", 7, 2),  # ... ; pooler, classifier
    ],
)
def test_one_staircase_for_one_tensor(family, each, outside, grad):
    model, batch = converted(family)
    for _ in range(2):  # the norms know their readers from the second forward on
        with torch.set_grad_enabled(grad), _Counter() as counter:
            model(**batch)
        assert counter.count == 2 * each + outside
