"""Converted models of transformers that go to the disk and come back."""

from __future__ import annotations

import block_models
import torch
import transformers as hf
from packing_cases import assert_same
from transformer_models import FAMILIES, built, converted, gradients, logits, opt, t5, tokens, yolos

import coarsegrad as cg
from coarsegrad.quantization import describe


def nemotron():
    """Its MLP squares a relu."""
    config = hf.NemotronConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    ids = tokens()
    return hf.NemotronForCausalLM(config), {"input_ids": ids, "labels": ids}


def blocks(family, dtype=torch.float32, **more):
    """A model with every kind of signed staircase."""
    model, batch = block_models.built(family, dtype)
    cg.quantize_(model, None, **{**block_models.options(family), **more})
    return model, batch


def again(model, folder, **how):
    """The model after a stay on the disk; nothing was missing or left over."""
    model.save_pretrained(folder)
    loaded, info = getattr(hf, type(model).__name__).from_pretrained(folder, output_loading_info=True, **how)
    assert not any(info.values()), info
    return loaded


def assert_equal(one, other, batch):
    """The same outputs, gradients in training, tensors and settings; and these parameters train."""
    assert torch.equal(logits(one, batch), logits(other, batch))
    assert describe(one) == describe(other)
    assert_same(one.state_dict(), other.state_dict())
    assert {name: (p.dtype, p.requires_grad) for name, p in one.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in other.named_parameters()
    }
    if "labels" in batch:
        assert_same(gradients(one, batch), gradients(other, batch))


MADE = {
    **{family: lambda family=family: converted(FAMILIES[family], 4, learn_alpha=True) for family in FAMILIES},
    "nemotron": lambda: converted(nemotron, 3, ste="relu", rounding="ceil"),
    "yolos, whose class is rewritten": lambda: converted(yolos, 4, learn_alpha=True),
    "t5, by execution, dropout folded": lambda: _t5_by_execution(),
    **{f"{f}, blocks": lambda f=f: blocks(f) for f in block_models.FAMILIES},
    "llama, 4 bits, rotated, exact norms": lambda: blocks(
        "llama", inputs={"bits": 4, "group": 16, "rotation": 16}, norms="exact", gates={"bits": 4, "group": 32}
    ),
    "gpt2, one bit weights": lambda: blocks("gpt2", weight_bits=1, weight_ste="trust"),
    "opt, both, 2 bit weights": lambda: converted(opt, 4, learn_alpha=True, inputs=8, attention=8, weight_bits=2),
}


def _t5_by_execution():
    model, batch = built(t5)
    cg.quantize_(model, 4, fold_dropout=True, example_inputs=batch, ste="relu")
    cg.calibrate(model, [batch], progress=False)
    return model, batch
