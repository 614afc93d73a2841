"""Small models of transformers without ReLU, and what their blocks keep, for the tests of `quantize_`'s staircases."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf
from transformer_models import images, tokens

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 48, 128, 3, 1
TEXT = {
    "vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
    "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": KV_HEADS, "head_dim": 16}


def _causal(config):
    model, ids = hf.AutoModelForCausalLM.from_config(config), tokens()
    model.loss_type = "ForCausalLM"  # otherwise some warn of using it, which torch.compile does not trace
    return model, {"input_ids": ids, "labels": ids}


def llama(layers=2, **sizes):
    return _causal(hf.LlamaConfig(**{**GROUPED, **sizes}, num_hidden_layers=layers))


def qwen3(layers=2):
    return _causal(hf.Qwen3Config(**GROUPED, num_hidden_layers=layers, tie_word_embeddings=True))


def gemma3(layers=2):
    config = hf.Gemma3TextConfig(**GROUPED, num_hidden_layers=layers, sliding_window=8, query_pre_attn_scalar=16)
    return _causal(config)


def gpt2(layers=2):
    config = hf.GPT2Config(
        vocab_size=64, n_embd=HIDDEN, n_layer=layers, n_head=HEADS, n_positions=64, use_cache=False, resid_pdrop=0.1,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _causal(config)


def vit(layers=2):
    config = hf.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS, num_hidden_layers=layers,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), {"pixel_values": images(), "labels": torch.tensor([0, 1, 1, 0])}


def bert(layers=2):
    config = hf.BertConfig(**{**TEXT, "num_hidden_layers": layers})
    return hf.BertForSequenceClassification(config), {"input_ids": tokens(), "labels": torch.tensor([0, 1, 1, 0])}


FAMILIES = {"llama": llama, "qwen3": qwen3, "gemma3": gemma3, "gpt2": gpt2, "vit": vit, "bert": bert}
GATED = ("llama", "qwen3", "gemma3")


def built(family, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    model, batch = FAMILIES[family](**sizes)
    return model.to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def options(family, bits=8, norms="coarse", group=None):
    """The arguments for `quantize_` that convert all of a block."""
    gates = {"gates": {"bits": bits, "group": group}} if family in GATED else {}
    return {"inputs": {"bits": bits, "group": group}, "attention": 8, "norms": norms, **gates}


def checkpoint(model, on=True, **how):
    """Have every layer be checkpointed, or no more. how: arguments of torch's checkpoint."""
    stem = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{stem}_checkpointing_enable")(**({f"{stem}_checkpointing_kwargs": how} if how else {}))
    else:
        getattr(model, f"{stem}_checkpointing_disable")()
