"""What the staircases do, in the logs of transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from packing_cases import assert_same
from transformer_models import built, opt

import coarsegrad as cg
from coarsegrad.integrations import StatsCallback

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.arange(4, 16) + index % 8
        return {"input_ids": ids, "labels": ids}


def trained(folder, callback=None, bits=4, **settings):
    """A Trainer after 4 steps of 2 micro-batches of 2."""
    model, _ = built(opt)
    if bits:
        cg.quantize_(model, bits, ste="relu", learn_alpha=True)
    arguments = hf.TrainingArguments(
        output_dir=folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True, seed=5,
        **{"logging_steps": 2, **settings},
    )  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=Tokens())
    trainer.remove_callback(hf.PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return trainer


def test_scalars_of_each_layer_are_logged_at_the_steps_of_the_loss(tmp_path):
    plain = trained(tmp_path)
    logged = trained(tmp_path, StatsCallback)
    assert_same(logged.model.state_dict(), plain.model.state_dict())
    names = [name for name, m in logged.model.named_modules() if isinstance(m, cg.QReLU)]
    found = {entry["step"]: entry for entry in logged.state.log_history if f"zero/{names[0]}" in entry}
    assert list(found) == [2, 4] == [entry["step"] for entry in logged.state.log_history if "loss" in entry]
    for name in names:
        assert all(0 < entry[f"zero/{name}"] < 1 and 0 <= entry[f"saturated/{name}"] < 1 for entry in found.values())
    before = [entry[f"alpha/{names[0]}"] for entry in found.values()]
    assert before[0] != before[1]  # learned
    assert not any("forward" in vars(m) for m in logged.model.modules() if isinstance(m, cg.QReLU))


def test_every_and_the_micro_batches_of_a_step(tmp_path, monkeypatch):
    elements, report = [], cg.quantization.LiveStats.report

    def counted(live):
        made = report(live)
        elements.append(made[0].elements)
        assert not any("forward" in vars(layer) for layer in live._layers.values())  # no longer counted
        return made

    monkeypatch.setattr(cg.quantization.LiveStats, "report", counted)
    trainer = trained(tmp_path, lambda trainer: StatsCallback(trainer, every=3))
    assert [e["step"] for e in trainer.state.log_history if any(key.startswith("zero/") for key in e)] == [4]
    assert elements == [2 * 2 * 12 * trainer.model.config.ffn_dim]


def test_an_interrupted_step_leaves_nothing_in_the_model(tmp_path, monkeypatch):
    losses, compute_loss = [], hf.Trainer.compute_loss

    def interrupted(trainer, model, *args, **kwargs):
        loss = compute_loss(trainer, model, *args, **kwargs)
        losses.append(any("forward" in vars(m) for m in model.modules() if isinstance(m, cg.QReLU)))
        if len(losses) == 4:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(hf.Trainer, "compute_loss", interrupted)
    models = []
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, lambda trainer: models.append(trainer.model) or StatsCallback(trainer))
    assert losses == [False, False, True, True]  # of step 2
    assert not any("forward" in vars(m) for m in models[0].modules() if isinstance(m, cg.QReLU))


def test_a_trainer_that_logs_at_no_steps(tmp_path):
    trainer = trained(tmp_path, StatsCallback, logging_strategy="no", logging_steps=0)
    assert [list(entry) for entry in trainer.state.log_history if "train_loss" not in entry] == []


def test_mistakes(tmp_path):
    with pytest.raises(TypeError, match="trainer must be a transformers.Trainer, got str"):
        StatsCallback("trainer")
    with pytest.raises(TypeError, match="trainer must be a transformers.Trainer, got type"):
        StatsCallback(hf.Trainer)
    with pytest.raises(ValueError, match="every must be an int >= 1 or None, got 0"):
        trained(tmp_path, lambda trainer: StatsCallback(trainer, every=0))
    with pytest.raises(ValueError, match="the model must have a QReLU for StatsCallback"):
        trained(tmp_path, StatsCallback, bits=None)
    with pytest.raises(ValueError, match="torch_compile must be False with StatsCallback"):
        trained(tmp_path, StatsCallback, torch_compile=True)
