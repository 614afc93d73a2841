"""The code of docs/hosts.md for packages that the development environment lacks runs where they are installed, and does
what the page says."""

from __future__ import annotations

import re

import pytest
import torch
from packing_cases import assert_same
from paths import ROOT

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (ROOT / "docs" / "hosts.md").read_text()
BLOCKS = dict(re.findall(r"^## (\w+)\n(?:(?!^## )(?:.*\n))*?```py\n((?:.*\n)*?)```\n", PAGE, flags=re.MULTILINE))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The names that the block of a section defines."""
    monkeypatch.chdir(tmp_path)

    def execute(section):
        namespace = {}
        exec(compile(BLOCKS[section], f"hosts.md, {section}", "exec"), namespace)
        return namespace

    return execute


def test_all_sections_with_such_code_are_here():
    assert list(BLOCKS) == ["TRL", "Lightning", "torchao", "torchtitan"]


@pytest.mark.filterwarnings("ignore")
def test_trl(run):
    pytest.importorskip("trl", reason="trl and datasets are not in the development environment")
    names = run("TRL")
    trainer = names["trainer"]
    layers = [name for name, m in trainer.model.named_modules() if isinstance(m, cg.QReLU)]
    logged = [entry for entry in trainer.state.log_history if f"alpha/{layers[0]}" in entry]
    assert [entry["step"] for entry in logged] == [2, 4] and len(layers) == 2
    assert logged[0][f"alpha/{layers[0]}"] != logged[1][f"alpha/{layers[0]}"]
    with_loss = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(with_loss) == 2 and all("mean_token_accuracy" in entry for entry in with_loss)  # TRL's own are there

    peft = pytest.importorskip("peft")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    again = names["trl"].SFTTrainer(
        names["model"], names["options"], train_dataset=names["texts"], processing_class=names["tokenizer"],
        peft_config=adapters,
    )  # fmt: skip
    again.train()
    after = {name.replace(".base_layer", ""): p for name, p in again.model.base_model.model.named_parameters()}
    assert_same({name: after[name] for name in before}, before)  # alphas too
    assert any(p.any() for name, p in after.items() if "lora_B" in name)


@pytest.mark.filterwarnings("ignore")
def test_lightning(run):
    pytest.importorskip("lightning", reason="lightning is not in the development environment")
    names = run("Lightning")
    classifier, again, trainer = (names[name] for name in ("classifier", "again", "trainer"))
    assert {"zero/1", "saturated/1", "alpha/1"} <= trainer.logged_metrics.keys()
    assert_same(again.state_dict(), classifier.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(again.eval().net(x), classifier.eval().net(x)) and classifier.net[1].alpha.requires_grad


@pytest.mark.filterwarnings("ignore")
def test_torchao(run):
    pytest.importorskip("torchao", reason="torchao is of the extra peers")
    assert len(run("torchao")["model"].report.converted) == 1


@pytest.mark.filterwarnings("ignore")
def test_torchtitan(run):
    pytest.importorskip("torchtitan", reason="torchtitan is not in the development environment")
    run("torchtitan")["model"].verify_module_protocol()
