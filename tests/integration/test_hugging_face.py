"""save_pretrained and from_pretrained of transformers: converted models come back to the bit."""

from __future__ import annotations

import copy
import json
import pickle

import accelerate
import block_models
import peft
import pytest
import torch
import transformers as hf
from packing_cases import assert_same
from saved_models import MADE, again, assert_equal, blocks
from torch import nn
from transformer_models import FAMILIES, built, converted, gradients, logits, opt

import coarsegrad as cg
from coarsegrad.integrations.transformers import keep_when_saved
from coarsegrad.quantization import describe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MADE)
def test_round_trip(name, tmp_path):
    model, batch = MADE[name]()
    loaded = again(model, tmp_path)
    assert type(loaded).__name__ == type(model).__name__ and not loaded.training
    assert_equal(model, loaded, batch)
    assert_equal(model, again(loaded, tmp_path / "twice"), batch)
    if name in ("opt", "t5", "vit", "bert", "nemotron") or "blocks" in name:
        assert "rewritten" not in describe(loaded)  # it does not depend on sources of transformers
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "twice")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("name", ["opt", "t5", "llama, blocks"])
def test_round_trip_in_shards_and_by_device_map(name, tmp_path):
    model, batch = MADE[name]()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    auto = hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM
    for how in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        assert_equal(model, auto.from_pretrained(tmp_path, **how), batch)


def test_an_offloaded_model(tmp_path):
    """Some layers of it are on the disk until they run."""
    model, batch = blocks("llama", weight_bits=4)
    model.save_pretrained(tmp_path / "model")
    rest = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where = {**rest, "model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=where, offload_folder=tmp_path / "offloaded"
    )
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_dtypes(name, dtype, tmp_path):
    """Alphas are float32, or float64 in a model of that."""
    model, batch = block_models.built(name) if name == "llama" else built(opt)
    model.save_pretrained(tmp_path / "float")
    # Not model.to(dtype), which narrows the angles of Llama's rotary embedding as well.
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype)
    if name == "llama":
        cg.quantize_(model, None, weight_bits=8, **block_models.options(name))
    else:
        cg.quantize_(model, 4, learn_alpha=True)
        cg.calibrate(model, [batch], progress=False)
        model.to(dtype)
    loaded = again(model, tmp_path)
    assert loaded.dtype == dtype
    assert_equal(model, loaded, batch)
    widened = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for one, other in zip(widened.modules(), model.modules()):
        if isinstance(other, cg.QReLU):
            assert torch.equal(one.alpha, other.alpha) and one.alpha.dtype == other.alpha.dtype


def test_alphas_per_channel_fixed_and_changed_by_hand(tmp_path):
    model, batch = converted(opt, 4, alpha=0.01)
    cg.calibrate(model, [batch], channel_dim=-1, progress=False)
    layers = [module for module in model.modules() if isinstance(module, cg.QReLU)]
    layers[0]._set_alpha(torch.tensor([0.03]), None)
    layers[1].ste, layers[1].alpha_scale = "reverse_exponential", "lsq"
    loaded = again(model, tmp_path)
    assert_equal(model, loaded, batch)
    first, second = [module for module in loaded.modules() if isinstance(module, cg.QReLU)]
    assert first.alpha.item() == pytest.approx(0.03) and first.channel_dim is None
    assert second.alpha.numel() == 64 and second.channel_dim == -1 and second.alpha_scale == "lsq"


def test_staircases_put_in_by_hand_and_a_part_of_a_model(tmp_path):
    model, batch = built(opt)
    cg.quantize_(model.model.decoder.layers, 4)
    model.model.decoder.layers[0].activation_fn = cg.QSigned(3, alpha=0.02, learn_alpha=True)
    model.model.decoder.final_layer_norm.register_forward_hook(lambda *_: None)  # hooks of others are not ours
    keep_when_saved(model)
    loaded = again(model, tmp_path)
    assert_equal(model, loaded, batch)
    assert isinstance(loaded.model.decoder.layers[0].activation_fn.alpha, nn.Parameter)
    decoder = copy.deepcopy(model).model.decoder  # is a model of transformers too
    keep_when_saved(decoder)
    decoder.save_pretrained(tmp_path / "decoder")
    staircases = json.loads((tmp_path / "decoder" / "config.json").read_text())["quantization_config"]["staircases"]
    assert [entry["names"] for entry in staircases["qrelus"]] == [["layers.1.activation_fn"]]


def test_other_heads_on_the_same_base(tmp_path):
    """transformers loads the weights of the base model with and without its prefix."""
    model, batch = blocks("llama", weight_bits=4)
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", cg.QWeight(4))
    model.save_pretrained(tmp_path / "causal")
    ids = {"input_ids": batch["input_ids"]}
    with pytest.warns(UserWarning, match="LlamaModel has no lm_head, whose staircases are left out"):
        base = hf.AutoModel.from_pretrained(tmp_path / "causal")
    with torch.no_grad():
        want = model.eval().model(**ids).last_hidden_state
        assert torch.equal(base(**ids).last_hidden_state, want)
        base.save_pretrained(tmp_path / "base")
        other = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
        assert torch.equal(other.model(**ids).last_hidden_state, want)
    assert_equal(other, again(other, tmp_path / "other"), ids)


def test_packing_comes_back(tmp_path):
    model, batch = MADE["opt"]()
    cg.pack_activations_(model)
    loaded = again(model, tmp_path)
    assert_equal(model, loaded, batch)
    kept = [cg.saved_memory(lambda m=m: m(**batch)).total for m in (model.train(), loaded.train())]
    assert kept[0] == kept[1]


def test_tied_weights(tmp_path):
    for name in ("opt", "qwen3, blocks"):
        model, _ = MADE[name]()
        loaded = again(model, tmp_path / name[:3])
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_copies_are_saved_as_themselves(tmp_path):
    model, batch = MADE["opt"]()
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for module in twin.modules():
                if isinstance(module, cg.QReLU):
                    module.alpha.mul_(2)
        loaded = again(twin, tmp_path / str(i))
        assert_equal(twin, loaded, batch)
        assert not torch.equal(logits(loaded, batch), logits(model, batch))


def test_a_loaded_model_is_the_float_model_converted(tmp_path):
    """It casts, undoes and is saved like one."""
    model, _ = MADE["opt"]()
    loaded = again(model, tmp_path)
    assert not loaded.is_quantized and not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.half().dtype == torch.float16


def test_undo_leaves_a_model_that_is_saved_as_float(tmp_path):
    model, batch = built(opt)
    want, keys = logits(model, batch), set(vars(model))
    report = cg.quantize_(model, 4)
    assert set(vars(model)) - keys == {"save_pretrained"}
    report.undo()
    assert set(vars(model)) == keys
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(hf.OPTForCausalLM.from_pretrained(tmp_path), batch), want)


# ------------------------------------------------------------------------------------ while it is loaded


OPTIONS = {
    "opt": {"bits": 4, "ste": "relu", "learn_alpha": True},
    "t5": {"bits": 2, "fold_dropout": True, "rounding": "hwgq"},
    "llama": {"bits": None, "inputs": 4, "gates": 8, "attention": 8, "norms": "coarse", "weight_bits": 2},
    "gpt2": {"bits": None, "inputs": {"bits": 4, "group": 16, "rotation": 16}},
}


@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_converted_while_it_is_loaded(name, how, tmp_path):
    model, batch = built(FAMILIES[name]) if name in FAMILIES else block_models.built(name)
    model.save_pretrained(tmp_path / "float", max_shard_size="50KB")
    auto, options = (hf.AutoModelForSeq2SeqLM if name == "t5" else hf.AutoModelForCausalLM), OPTIONS[name]
    want = auto.from_pretrained(tmp_path / "float")
    cg.quantize_(want, **options)
    got = auto.from_pretrained(tmp_path / "float", quantization_config=cg.CoarseGradConfig(**options, pack=True), **how)
    assert describe(got).pop("packed") == [{"names": [""]}]
    assert torch.equal(logits(want, batch), logits(got, batch))
    assert_same(gradients(got, batch), gradients(want, batch))
    assert_equal(got, again(got, tmp_path / "converted"), batch)


def test_a_dict_as_quantization_config(tmp_path):
    model, batch = built(opt)
    model.save_pretrained(tmp_path)
    config = {"quant_method": "coarsegrad", "bits": 3, "weight_bits": 4}
    loaded = hf.OPTForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    cg.quantize_(model, 3, weight_bits=4)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_a_filter_is_asked_while_a_model_is_loaded(tmp_path):
    built(opt)[0].save_pretrained(tmp_path)
    config = cg.CoarseGradConfig(4, filter_fn=lambda module, name: "layers.0" in name)
    loaded = hf.OPTForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert [name for name, m in loaded.named_modules() if isinstance(m, cg.QReLU)] == [
        "model.decoder.layers.0.activation_fn"
    ]


def test_conversion_on_several_devices_is_refused(tmp_path):
    model, _ = block_models.built("llama")
    model.save_pretrained(tmp_path / "model")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(ValueError, match="device_map must name one device where a model is converted, got cpu, disk"):
        hf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=where, offload_folder=tmp_path / "offloaded",
            quantization_config=cg.CoarseGradConfig(None, inputs=8),
        )  # fmt: skip


# ------------------------------------------------------------------------------------ adapters, trainers


@pytest.mark.parametrize("name", ["opt", "llama, blocks"])
def test_adapters_on_top(name, tmp_path):
    model, batch = MADE[name]()
    model.save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    for p in (p for name, p in adapted.named_parameters() if "lora_B" in name):
        nn.init.normal_(p, std=0.1)
    want = logits(adapted, batch)
    assert not torch.equal(want, logits(model, batch))
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter"), batch), want)
    for auto in (peft.AutoPeftModelForCausalLM, hf.AutoModelForCausalLM):  # which load the base themselves
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter"), batch), want)
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert_equal(merged, again(merged, tmp_path / "merged"), batch)


def test_adapters_of_transformers_are_saved_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # wants a newer one
    model, batch = MADE["opt"]()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False))
    want = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    fresh = hf.OPTForCausalLM.from_pretrained(tmp_path / "base")
    fresh.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(fresh, batch), want)


def test_a_model_converted_inside_its_adapters(tmp_path):
    model, batch = built(opt)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False))
    cg.quantize_(adapted, 4)
    merged = adapted.merge_and_unload().requires_grad_(True)
    assert_equal(merged, again(merged, tmp_path), batch)


class Repeated(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {name: t[i % len(t)] for name, t in self.batch.items()}


def test_trainer_saves_and_resumes(tmp_path):
    """Its checkpoints are folders for from_pretrained, and a model from one trains on, with moving alphas."""
    model, batch = converted(opt, 4, learn_alpha=True, weight_bits=4)
    model.save_pretrained(tmp_path / "start")

    def train(steps, **how):
        loaded = hf.OPTForCausalLM.from_pretrained(tmp_path / "start")
        arguments = hf.TrainingArguments(
            output_dir=tmp_path / "trainer", max_steps=steps, per_device_train_batch_size=4, save_steps=2,
            use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-3, seed=5,
        )  # fmt: skip
        trainer = hf.Trainer(loaded, arguments, train_dataset=Repeated(batch))
        trainer.train(**how)
        return trainer.model

    trained = train(4)
    assert not torch.equal(logits(trained, batch), logits(model, batch))
    assert_equal(trained, hf.OPTForCausalLM.from_pretrained(tmp_path / "trainer" / "checkpoint-4"), batch)
    resumed = train(4, resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert_same(resumed.state_dict(), trained.state_dict())


def test_accelerate_saves(tmp_path):
    model, batch = MADE["opt"]()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path, is_main_process=True, save_function=accelerator.save, state_dict=accelerator.get_state_dict(prepared)
    )
    assert_equal(model, hf.OPTForCausalLM.from_pretrained(tmp_path), batch)


# ------------------------------------------------------------------------------------ integers


def test_an_integer_model_is_made_again_from_its_low_bit_model(tmp_path):
    model, batch = converted(opt, 4, weight_bits=4)
    inputs = (batch["input_ids"],)
    integers = cg.convert(model.eval(), inputs)
    with pytest.raises(TypeError, match="save_pretrained cannot save the graph that convert returns"):
        integers.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="save_pretrained cannot save the graph"):
        copy.deepcopy(integers).save_pretrained(tmp_path)
    twin = cg.convert(again(model, tmp_path), inputs)
    assert_same(twin.state_dict(), integers.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(*inputs).logits, integers(*inputs).logits)
