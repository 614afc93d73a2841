"""`python -m coarsegrad rounding`: LeNet-5 on a few small images, and a tiny OPT on a text written here."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
import torch
from interruptions import count_calls
from paths import ROOT
from small_mnist import idx_bytes
from test_finetune import write_texts
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments import data, results, rounding, rounding_report, rounding_tasks
from coarsegrad.experiments.models import resnet14

RESULTS = ROOT / "bench" / "results" / "rounding"
OPTIONS = ["--networks", "lenet", "opt", "--bits", "2", "--float-steps", "2", "--steps", "1", "--threads", "1"]
NEW = ["2bit-ceil", "2bit-nearest", "2bit-hwgq", "2bit-ceil-corrected"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    images, texts = tmp_path_factory.mktemp("idx"), tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for part, count in (("train", 130), ("test", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (images / data._IDX_NAMES[f"{part}_images"]).write_bytes(idx_bytes(pixels))
        (images / data._IDX_NAMES[f"{part}_labels"]).write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) % 10))
    return ["--data", str(images), "--text", str(write_texts(texts, 0))]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_LAYERS": 1, "_WIDTH": 16, "_VOCABULARY": 300, "_LENGTH": 16, "_VALIDATION": 4}.items():
            patch.setattr(rounding_tasks, name, value)
        yield


def run(inputs, out, *options):
    parser = argparse.ArgumentParser()
    rounding.add_arguments(parser)
    threads = torch.get_num_threads()
    try:
        rounding.main(parser.parse_args([*inputs, "--out", str(out), *OPTIONS, *options]))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(inputs, out)
    return out


def numbers(out):
    networks = json.loads((out / "results.json").read_text())["networks"]
    return {name: network["runs"] for name, network in networks.items()}


def test_end_products(whole, inputs, capsys):
    for runs in numbers(whole).values():
        tuned = [f"{key}-{ste}-tuned" for key in NEW for ste in rounding.STES]
        assert list(runs) == ["float", "float-tuned", *NEW, *tuned]
        before = [runs[key]["output_error"] for key in NEW]
        assert len(set(before)) == 4 and all(0 < error < 1 for error in before)
        kept = {key: run["kept_bytes"] for key, run in runs.items() if run["tuned"]}
        # The codes of ceil and hwgq say what relu's gate is; under nearest it is a bit beside them.
        assert kept["2bit-ceil-relu-tuned"] == kept["2bit-hwgq-relu-tuned"] < kept["2bit-nearest-relu-tuned"]
        assert len({kept[f"2bit-{name}-clipped_relu-tuned"] for name in ("ceil", "nearest", "hwgq")}) == 1
        assert kept["2bit-nearest-relu-tuned"] < kept["float-tuned"]
    assert (whole / "rounding.png").read_bytes().startswith(b"\x89PNG\r\n")
    checkpoints = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert checkpoints == ["lenet.pt", "opt.pt"]

    report = (whole / "results.json").read_bytes()
    run(inputs, whole)  # finished already: only reports again
    printed = capsys.readouterr().out
    assert "(1 of" not in printed and rounding_report.summary(json.loads(report)) in printed
    assert (whole / "results.json").read_bytes() == report


def test_what_is_stopped_goes_on_to_the_same_numbers(whole, inputs, tmp_path, monkeypatch, capsys):
    # Among LeNet's runs, and among the OPT's.
    count_calls(monkeypatch, rounding._Network, "_measure", stop_at=(5, 21))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run(inputs, tmp_path)
        assert ended.value.code == 130 and "same command to continue" in capsys.readouterr().out
        torch.manual_seed(99)  # nothing hangs on the generator's state
    run(inputs, tmp_path)
    assert numbers(tmp_path) == numbers(whole)


def test_what_is_of_another_configuration_is_refused(whole, inputs, tmp_path):
    with pytest.raises(SystemExit, match="steps: 1 there, 2 now"):
        run(inputs, whole, "--steps", "2")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match="not a results file of this command"):
        run(inputs, tmp_path)


# The correction


def test_corrected_layers_have_the_means_of_the_reference():
    torch.manual_seed(0)
    reference = resnet14(nn.ReLU).train()
    x = torch.randn(32, 1, 28, 28)
    reference(x)  # moves BatchNorm's statistics away from where they begin
    task = rounding_tasks.Images.__new__(rounding_tasks.Images)
    task.start, task.calibration = reference, [x]
    means = {}
    for name, model in {
        "float": reference, "ceil": task.converted(2, "ceil", "relu"),
        "corrected": task.converted(2, "ceil", "relu", corrected=True),
    }.items():  # fmt: skip
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        seen = means[name] = []
        for layer in layers:
            layer.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach().mean((0, 2, 3))))
        model.eval()(x)
    for wanted, plain, corrected in zip(*means.values(), strict=True):
        torch.testing.assert_close(corrected, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    assert all(m.bias is None for m in reference.modules() if isinstance(m, nn.Conv2d))


def test_a_weight_that_two_modules_share_gets_no_bias():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.ReLU(), head)
    rounding_tasks.correct_means_(model, model, lambda m: m(torch.arange(5)))
    assert head.bias is None


# The results that are in the repository


def test_the_page_of_the_docs_is_that_of_the_results():
    page = RESULTS.parent.parent.parent / "docs" / "rounding.md"
    assert results.render(page.read_text(), page.parent) == page.read_text()
    report = json.loads((RESULTS / "results.json").read_text())
    assert all("dirty" not in network["environment"]["git"] for network in report["networks"].values())


def test_the_table_of_bits_kept():
    page = (RESULTS.parent.parent.parent / "docs" / "rounding.md").read_text()
    alpha = r"(fixed|learned)(?:, `alpha_grad=\"(\w+)\"`)?"
    rows = re.findall(rf"^\| `(\w+)`.*? \| {alpha} \| (\d) \| (\d) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    x = torch.randn(64, 64)
    for ste, alpha, rule, others, nearest in rows:
        learned = {"learn_alpha": alpha == "learned"} | ({"alpha_grad": rule} if rule else {})
        for rounding_, bits in (("ceil", others), ("hwgq", others), ("nearest", nearest)):
            activation = cg.QReLU(4, ste=ste, rounding=rounding_, **learned)
            with cg.packed_activations():
                kept = cg.saved_memory(nn.Sequential(nn.Linear(64, 512), activation, nn.Linear(512, 8)), x).total
            assert kept * 8 // (64 * 512) == int(bits), (ste, alpha, rule, rounding_)


def test_nearest_changes_the_outputs_least():
    """What quantize_'s default follows from."""
    networks = numbers(RESULTS)
    assert set(networks) == set(rounding.NETWORKS)
    for runs in networks.values():
        for bits in (2, 3, 4, 8):
            errors = {name: runs[f"{bits}bit-{name}"]["output_error"] for name in ("ceil", "nearest", "hwgq")}
            assert min(errors, key=errors.get) == "nearest"
