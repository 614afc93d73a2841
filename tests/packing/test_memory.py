"""The memory meter: bytes counted by hand, what it leaves out, and the savings that it refuses to claim."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import coarsegrad as cg
from coarsegrad.__main__ import main


def mlp(activation):
    return nn.Sequential(nn.Linear(16, 32), activation, nn.Linear(32, 8))


X = torch.randn(10, 16)


def test_by_hand():
    report = cg.saved_memory(mlp(nn.ReLU()), X)
    # The input and the weights are there anyway; the ReLU's output serves the Linear after it as well.
    assert report.by_module == {"1": 10 * 32 * 4} and report.total == 10 * 32 * 4
    (storage,) = report.storages
    assert storage == cg.memory.SavedStorage("1", (10, 32), torch.float32, 10 * 32 * 4)
    mask = cg.saved_memory(mlp(cg.QReLU(2)), X)
    assert mask.by_module == {"1": 10 * 32 // 8, "2": 10 * 32 * 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_codes_count_with_their_own_bytes(dtype):
    n, x = 10 * 32, X.to(dtype)
    for ste, width in (("relu", 2), ("clipped_relu", 3)):
        model = mlp(cg.QReLU(2, ste=ste)).to(dtype)
        with cg.pack_activations_(model):
            inside = cg.saved_memory(model, x)
        with cg.packed_activations():
            around = cg.saved_memory(model, x)
        assert inside.total == around.total == n * width // 8 + model[1].alpha.nbytes
        model[2].requires_grad_(False)
        with cg.packed_activations():
            assert cg.saved_memory(model, x).total == n // 8


def test_a_qrelu_may_come_last():
    """Its node, of C++, is no torch.autograd.graph.Node."""
    assert cg.saved_memory(cg.QReLU(2), X.clone().requires_grad_()).total == X.numel() // 8


def test_the_parts_of_a_network_add_up_and_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 32), nn.Sigmoid())

        def forward(self, x):
            return self.body(x).tanh()

    report = cg.saved_memory(Net(), X)
    assert report.by_module == {"body.1": 1280, "Net": 1280}
    report = cg.saved_memory(lambda x: Net()(x).exp(), X)
    assert report.by_module == {"body.1": 1280, "Net": 1280, "(outside of modules)": 1280}


def test_each_storage_counts_once_and_whole():
    weight = torch.randn(10, 10, requires_grad=True)

    def forward():
        y = weight * 2
        return (y * y).sum() + (y.t()[:3] * y.t()[:3]).sum()

    report = cg.saved_memory(forward)
    assert [storage.bytes for storage in report.storages] == [400]


def test_leaves_that_require_grad_are_there_anyway():
    weight, other = torch.randn(8, requires_grad=True), torch.randn(8)
    assert cg.saved_memory(lambda: weight * weight).total == 0
    assert cg.saved_memory(lambda: weight * other).total == 32


def test_only_what_is_kept_when_the_forward_is_over():
    """An intermediate graph that is dropped, and an output that nobody keeps."""
    linear = nn.Linear(16, 8)

    def forward(x):
        linear(x).exp().sum()  # its graph ends here
        return linear(x)

    assert cg.saved_memory(forward, X).total == 0


def test_several_outputs_and_inputs_in_any_nesting():
    linear = nn.Linear(16, 8)
    report = cg.saved_memory(lambda inputs: {"a": [linear(inputs["x"]).exp(), None]}, {"x": X})
    assert report.total == 10 * 8 * 4


def test_sparse_tensors_count_with_their_parts():
    dense = torch.randn(6, 4, requires_grad=True)
    matrix = torch.eye(6).to_sparse()
    assert cg.saved_memory(lambda: torch.sparse.mm(matrix, dense)).total == 2 * 6 * 8 + 6 * 4


def test_the_run_leaves_nothing_behind():
    model = mlp(cg.QReLU(2))
    cg.saved_memory(model, X)
    with pytest.raises(KeyError), cg.packed_activations():
        cg.saved_memory(lambda: {}["missing"])
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert not nn.modules.module._has_any_global_hook()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module_is_reported_as_one(recwarn, backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 32), cg.nn.QReLULinear(cg.QReLU(2, ste="relu"), nn.Linear(32, 8)))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    report = cg.saved_memory(compiled, X)
    assert report.by_module == {"OptimizedModule": 10 * 32 * 2 // 8}
    assert not [warning for warning in recwarn if "global hooks" in str(warning.message)]
    torch._dynamo.reset()


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="must return a tensor that requires grad"), torch.no_grad():
        cg.saved_memory(mlp(nn.ReLU()), X)
    with pytest.raises(ValueError, match="must return a tensor that requires grad"):
        cg.saved_memory(lambda: None)


def test_comparison():
    model = mlp(cg.QReLU(2))
    before = cg.saved_memory(mlp(nn.ReLU()), X)
    with cg.pack_activations_(model):
        both = before.compare(cg.saved_memory(model, X))
    assert both.ratio == pytest.approx((10 * 32 * 3 // 8 + 4) / (10 * 32 * 4))
    lines = str(both).splitlines()
    assert lines[-2].split() == ["total", "1,280", "124"] and lines[-1] == "ratio 0.097"
    assert repr(both) == str(both)


def test_savings_that_were_not_measured_are_refused():
    report = cg.saved_memory(mlp(nn.ReLU()), X)
    for other in (X[:5], X.double()):
        model = mlp(nn.ReLU()).to(other.dtype)
        with pytest.raises(ValueError, match="same shapes and dtypes"):
            report.compare(cg.saved_memory(model, other))
    with pytest.raises(ValueError, match="same shapes and dtypes"):
        report.compare(cg.saved_memory(lambda x: mlp(nn.ReLU())(x).sum(), X))
    with pytest.raises(ValueError, match="saves nothing for backward"):
        linear = nn.Linear(16, 8)
        cg.saved_memory(linear, X).compare(report)
    with pytest.raises(TypeError, match="after must be what saved_memory returned, got int"):
        report.compare(3)


@pytest.mark.parametrize("packed", [False, True])
def test_what_other_hooks_hide_is_named_and_nothing_claimed(packed):
    model = mlp(nn.ReLU())
    hidden = {
        "checkpoint": lambda x: checkpoint(model, x, use_reentrant=False),
        "offload": lambda x: offloaded(model, x),
    }
    seen = cg.saved_memory(model, X)
    assert not seen.unseen
    for forward in hidden.values():
        if packed:
            with cg.packed_activations():
                report = cg.saved_memory(forward, X)
        else:
            report = cg.saved_memory(forward, X)
        assert report.unseen == ("Sequential", "0", "1", "2") and "Not measured" in str(report)
        with pytest.raises(ValueError, match="after did not measure what Sequential, 0, 1, 2 save"):
            seen.compare(report)
        with pytest.raises(ValueError, match="before did not measure"):
            report.compare(seen)


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc/self/statm, which is Linux's")
def test_agrees_with_the_allocator_of_another_process():
    """Large enough to show: the process grows by what the meter says, and by little more."""
    script = """
import torch, coarsegrad as cg, resource
torch.set_num_threads(1)
layers = [m for _ in range(8) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
model, x = torch.nn.Sequential(*layers), torch.randn(65536, 64)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model(x[:8])
before = resident()
out = model(x)
grown = resident() - before
print(cg.saved_memory(model, x).total, grown)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said, grown = map(int, run.stdout.split())
    assert said == 8 * 65536 * 64 * 4
    assert 0.95 * said < grown < 1.2 * said


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the bars")
    before, after = cg.saved_memory(mlp(nn.ReLU()), X), cg.saved_memory(mlp(cg.QReLU(2)), X)
    before.plot(tmp_path / "one.png")
    before.compare(after).plot(tmp_path / "two.svg")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "two.svg").read_text()
    assert "<svg" in text and text.count('id="patch_') > 4  # two bars for each of two modules, and the frame


@pytest.mark.parametrize("model", ["opt-125m-config", "t5-small-config", "mlp", "lenet"])
def test_command(model, capsys):
    main(["memory", "--model", model, "--layers", "1", "--batch", "2", "--seq", "8", "--ste", "relu"])
    text = capsys.readouterr().out
    assert text.startswith(f"{model}: before, nn.ReLU; after, packed QReLU with 2 bits (relu, ceil)")
    assert float(text.splitlines()[-1].split()[1]) < 1


def test_command_counts_what_it_says(capsys):
    """One layer of the MLP in bfloat16: 2 bytes an element before, 3 bits and a copy of alpha, in float32, after."""
    main(["memory", "--model", "mlp", "--layers", "1", "--batch", "4"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert row.split() == ["total", f"{4 * 784 * 2:,}", f"{4 * 784 * 3 // 8 + 4:,}"]


def test_command_mistakes(capsys, tmp_path):
    with pytest.raises(SystemExit, match="--seq 513 is more than the 512 positions of t5-small-config"):
        main(["memory", "--model", "t5-small-config", "--seq", "513"])
    with pytest.raises(SystemExit, match="--batch must be at least 2 for lenet"):
        main(["memory", "--model", "lenet", "--batch", "1"])
    with pytest.raises(SystemExit):
        main(["memory", "--batch", "0"])
    assert "invalid positive int value: '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="No such file"):
        main(["memory", "--model", "mlp", "--batch", "1", "--out", str(tmp_path / "no" / "x.png")])


def test_logits_of_a_loss_outside_of_modules():
    linear, target = nn.Linear(16, 8), torch.zeros(10, dtype=torch.long)
    report = cg.saved_memory(lambda x, y: F.cross_entropy(linear(x), y), X, target)
    assert set(report.by_module) == {"(outside of modules)"} and report.total >= 10 * 8 * 4
