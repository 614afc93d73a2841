"""Converted models in what people train with, Trainer, LoRA, accelerate, checkpointing, autocast; saved and loaded."""

from __future__ import annotations

import copy
import pickle

import accelerate
import peft
import pytest
import torch
import transformers as hf
from packing_cases import assert_same
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformer_models import FAMILIES, built, converted, gradients, logits, opt, vit, yolos

import coarsegrad as cg

pytestmark = pytest.mark.usefixtures("one_thread")


def alphas(model):
    return {name: m.alpha.detach().clone() for name, m in model.named_modules() if isinstance(m, cg.QReLU)}


# ----------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_close_to_float_and_undo_is_the_very_same(family):
    model, batch = built(FAMILIES[family])
    want = logits(model, batch)
    errors = {}
    for bits in (8, 4, 2):
        report = cg.quantize_(model, bits)
        assert not report.skipped
        cg.calibrate(model, [batch], progress=False)
        errors[bits] = ((logits(model, batch) - want).norm() / want.norm()).item()
        report.undo()
        assert torch.equal(logits(model, batch), want)
    # A QReLU of 8 bits is 40 dB, 1%, from its ReLU, one of 4 bits 18 dB; the networks have 2 to 5, one after the other.
    assert 0 < errors[8] < 0.03
    assert errors[8] < errors[4] / 4 < errors[2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ste", ["relu", "clipped_relu"])
def test_packing_changes_no_gradient(family, ste):
    model, batch = converted(FAMILIES[family], 2, ste=ste, learn_alpha=True, fold_dropout=True)
    want = gradients(model, batch)
    plain = cg.saved_memory(lambda: model(**batch))
    assert any(name.endswith(".alpha") and g.any() for name, g in want.items())
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), want)
        assert cg.saved_memory(lambda: model(**batch)).total < plain.total


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["opt", "t5", "vit", "bert"])
def test_checkpointing(family, use_reentrant):
    model, batch = converted(FAMILIES[family], 2, ste="relu", learn_alpha=True)
    want = gradients(model, batch)
    plain = cg.saved_memory(lambda: model(**batch)).total
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients(model, batch)
    if family == "t5" and use_reentrant:  # each block adds to the gradient of its mask of positions in another order
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name])
    else:
        assert_same(got, want)
    assert cg.saved_memory(lambda: model(**batch)).total < plain
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), got)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    model, batch = converted(FAMILIES[family], 8, learn_alpha=True)
    want = gradients(model, batch)
    seen = set()
    layers = [m for m in model.modules() if isinstance(m, cg.QReLU)]
    hooks = [m.register_forward_hook(lambda _, args, y: seen.add((args[0].dtype, y.dtype))) for m in layers]
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, batch)
        with cg.pack_activations_(model):
            packed = gradients(model, batch)
    for hook in hooks:
        hook.remove()
    assert all(y == x for x, y in seen) and (torch.bfloat16, torch.bfloat16) in seen
    torch.testing.assert_close(packed, got)  # torch's kernels themselves may differ between the first run and the next
    assert got["loss"].float().item() == pytest.approx(want["loss"].item(), rel=0.02)
    g, w = (torch.cat([t.float().flatten() for t in r.values()]) for r in (got, want))
    assert torch.cosine_similarity(g, w, dim=0) > 0.95


# ----------------------------------------------------------------------------------------- trainers


class Tokens(torch.utils.data.Dataset):
    """Counting up from a random start: something that can be learnt."""

    def __init__(self, count=64):
        start = torch.randint(4, 48, (count, 1), generator=torch.Generator().manual_seed(3))
        self.ids = start + torch.arange(12)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def test_trainer(tmp_path):
    """Trains, moves alpha, and goes on from its checkpoint to the same weights."""

    def trainer(folder, steps=24):
        model, _ = built(opt)
        cg.quantize_(model, 4, ste="relu", learn_alpha=True, alpha_scale="lsq")
        cg.calibrate(model, [{"input_ids": Tokens().ids[:16]}], progress=False)
        cg.pack_activations_(model)
        groups = cg.param_groups(model, lr=5e-3, weight_decay=0.1)
        optimizer = cg.keep_positive(torch.optim.AdamW(groups), model)
        arguments = hf.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8, save_steps=12, logging_steps=4,
            use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant", seed=5,
        )  # fmt: skip
        return hf.Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, None))

    whole = trainer(tmp_path / "whole")
    before = alphas(whole.model)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    after = alphas(whole.model)
    assert all(after[name] > 0 and after[name] != before[name] for name in before)
    decays = {id(p): g["weight_decay"] for g in whole.optimizer.param_groups for p in g["params"]}
    for name, p in whole.model.named_parameters():
        assert decays[id(p)] == (0 if name.endswith(".alpha") else 0.1)

    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert resumed.state.global_step == 24
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_accelerate():
    model, batch = converted(opt, 4, ste="relu", learn_alpha=True, alpha_scale="lsq")
    twin = copy.deepcopy(model)

    def losses(model, optimizer, backward):
        found = []
        for _ in range(4):
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def optimizer_of(model):
        groups = cg.param_groups(model, lr=1e-2, weight_decay=0.1, alpha_lr=10.0)
        return cg.keep_positive(torch.optim.SGD(groups), model)

    want = losses(twin, optimizer_of(twin), torch.Tensor.backward)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    assert losses(prepared, optimizer, accelerator.backward) == want
    assert want[-1] < want[0]
    assert all((a > 0).all() for a in alphas(model).values())


# ----------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("convert", ["before", "after"])
def test_lora(convert, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], lora_dropout=0.0)
    model, batch = built(opt)

    def convert_it(model):
        cg.quantize_(model, 4, ste="relu", alpha=0.003)

    if convert == "before":
        convert_it(model)
    model = peft.get_peft_model(model, config)
    if convert == "after":
        convert_it(model)
    for p in (p for name, p in model.named_parameters() if "lora_B" in name):
        nn.init.normal_(p, std=0.1)
    want = gradients(model, batch)
    assert {name.split(".")[-3] for name in want if name != "loss"} == {"lora_A", "lora_B"}
    plain = cg.saved_memory(lambda: model(**batch)).total
    with cg.pack_activations_(model):
        assert_same(gradients(model, batch), want)
        assert cg.saved_memory(lambda: model(**batch)).total < plain

    outputs = logits(model, batch)
    model.save_pretrained(tmp_path)
    base, _ = built(opt)
    convert_it(base)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path), batch), outputs)


def test_lora_with_learned_alphas(tmp_path):
    """Those of a model that is converted before are trained, and saved with the adapter, as modules_to_save."""
    config = peft.LoraConfig(r=4, target_modules=["fc2"], modules_to_save=["activation_fn"])
    model, batch = converted(opt, 4, learn_alpha=True)
    model = peft.get_peft_model(model, config)
    optimizer = cg.keep_positive(torch.optim.SGD(cg.param_groups(model, lr=0.1, alpha_lr=1e-5)), model)
    groups = optimizer.param_groups
    assert len(groups) == 2 and len(groups[1]["params"]) == 2
    before = [p.item() for p in groups[1]["params"]]
    gradients(model, batch)
    optimizer.step()
    assert all(p.item() != b for p, b in zip(groups[1]["params"], before))
    outputs = logits(model, batch)
    model.save_pretrained(tmp_path)
    base, _ = converted(opt, 4, learn_alpha=True)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path), batch), outputs)


# ----------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("family", [*FAMILIES, "yolos"])
def test_saved_and_loaded(family, tmp_path):
    make = {**FAMILIES, "yolos": yolos}[family]
    model, batch = converted(make, 4, learn_alpha=True)
    want = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, batch), want)
        gradients_of = gradients if "labels" in batch else lambda *_: {}
        assert_same(gradients_of(twin, batch), gradients_of(model, batch))

    def fresh():
        other, _ = built(make, seed=1)
        cg.quantize_(other, 4, learn_alpha=True)
        return other

    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = fresh()
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    want = logits(model, batch)
    assert torch.equal(logits(loaded, batch), want)
    save_model(model, tmp_path / "model.safetensors")
    loaded = fresh()
    load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded, batch), want)


def test_what_save_pretrained_saves(tmp_path):
    """The alphas too, for `load_model` as well; a float model says that it has no place for them."""
    model, batch = converted(opt, 4, learn_alpha=True)
    model.save_pretrained(tmp_path)
    names = {f"{name}.{what}" for name in alphas(model) for what in ("alpha", "_extra_state")}
    assert names <= load_file(tmp_path / "model.safetensors").keys()
    config = hf.OPTConfig.from_pretrained(tmp_path)
    del config.quantization_config
    float_model, info = hf.OPTForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(info["unexpected_keys"]) == names and not info["missing_keys"]
    cg.quantize_(float_model, 4, learn_alpha=True)
    assert not torch.equal(logits(float_model, batch), logits(model, batch))
    load_model(float_model, tmp_path / "model.safetensors")
    assert torch.equal(logits(float_model, batch), logits(model, batch))
    other, _ = built(opt)
    cg.quantize_(other, 2)
    with pytest.raises(RuntimeError, match="layers.1.activation_fn.alpha: got the alpha of a QReLU with bits=4"):
        load_model(other, tmp_path / "model.safetensors")


def test_what_save_pretrained_saves_under_other_names_is_refused(tmp_path):
    """transformers keeps the names that ViT's weights had in older versions, in files."""
    model, _ = converted(vit, 4)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(model, tmp_path / "model.safetensors")
