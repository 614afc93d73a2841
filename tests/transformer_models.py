"""Small models of transformers, made from configs, and steps through them, for the tests of the stack."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as hf

import coarsegrad as cg

SIZES = {"num_attention_heads": 2, "hidden_size": 32}
IMAGE_TEXT = {**SIZES, "intermediate_size": 64, "hidden_act": "relu"}


def tokens():
    return torch.randint(4, 64, (4, 16))


def opt(layers=2):
    config = hf.OPTConfig(
        vocab_size=64, ffn_dim=64, num_hidden_layers=layers, max_position_embeddings=32, word_embed_proj_dim=32,
        dropout=0.0, use_cache=False, **SIZES,
    )  # fmt: skip
    ids = tokens()
    return hf.OPTForCausalLM(config), {"input_ids": ids, "labels": ids}


def t5(layers=2):
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=layers, num_heads=2, dropout_rate=0.1, use_cache=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens()}


def images():
    return torch.randn(4, 3, 32, 32)


def resnet(layers=2):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8] * layers, depths=[1] * layers, layer_type="basic")
    return hf.ResNetForImageClassification(config), {"pixel_values": images(), "labels": torch.tensor([0, 1, 1, 0])}


def vit(layers=2):
    config = hf.ViTConfig(num_hidden_layers=layers, image_size=32, patch_size=8, **IMAGE_TEXT)
    return hf.ViTForImageClassification(config), {"pixel_values": images(), "labels": torch.tensor([0, 1, 1, 0])}


def bert(layers=2):
    config = hf.BertConfig(vocab_size=64, num_hidden_layers=layers, max_position_embeddings=32, **IMAGE_TEXT)
    return hf.BertForSequenceClassification(config), {"input_ids": tokens(), "labels": torch.tensor([0, 1, 1, 0])}


def yolos(layers=1):
    """Its heads call F.relu in a loop of their forward: their class is rewritten."""
    config = hf.YolosConfig(num_hidden_layers=layers, image_size=[32, 32], patch_size=8, num_detection_tokens=3,
                            **IMAGE_TEXT)  # fmt: skip
    return hf.YolosForObjectDetection(config), {"pixel_values": images()}


FAMILIES = {"opt": opt, "t5": t5, "resnet": resnet, "vit": vit, "bert": bert}


def built(make, seed=0, **sizes):
    torch.manual_seed(seed)
    return make(**sizes)


def converted(make, bits=4, layers=None, **settings):
    """(model, batch), calibrated on the batch."""
    model, batch = built(make, **({} if layers is None else {"layers": layers}))
    cg.quantize_(model, bits, **settings)
    cg.calibrate(model, [batch], progress=False)
    return model, batch


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def gradients(model, batch):
    """The loss and the gradient of every parameter that has one, of a step in training mode."""
    model.train().zero_grad()
    torch.manual_seed(7)
    loss = model(**batch).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
