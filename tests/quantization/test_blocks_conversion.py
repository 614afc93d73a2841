"""What quantize_'s staircases find, skip, report and undo."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers as hf
from block_models import FAMILIES, GROUPED, HIDDEN, TEXT, built, options
from transformer_models import logits, tokens
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import coarsegrad as cg


def converted(family, **settings):
    model, batch = built(family)
    return model, batch, cg.quantize_(model, **(settings or options(family)))


def named(report, of):
    return [s.name for s in report.staircases if s.of.startswith(of)]


# ------------------------------------------------------------------------------------------ report and undo


def test_the_report_of_llama():
    _, _, report = converted("llama")
    assert named(report, "gate and up") == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert named(report, "q, k and v") == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert len(named(report, "input")) == 2 * 6 + 1 and len(named(report, "norm")) == 2 * 2 + 1
    assert not report.skipped and not report.replaced
    assert "lm_head" in str(report)
    assert f"{len(report.staircases)} signed staircases inserted" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_undo(family):
    model, batch = built(family)
    before, keys, attributes = logits(model, batch), list(model.state_dict()), [dict(vars(m)) for m in model.modules()]
    report = cg.quantize_(model, **options(family))
    assert not torch.equal(logits(model, batch), before)
    assert list(model.state_dict()) == keys
    report.undo()
    assert torch.equal(logits(model, batch), before)
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rotated_weights_read_rotated_inputs(family):
    """Also those whose input is codes already."""
    model, batch = built(family)
    wanted = logits(model, batch)
    settings = {"inputs": {"bits": 8, "rotation": 16}, "attention": 8, "norms": "coarse"}
    for gates in (None, 8):
        report = cg.quantize_(model, gates=gates, **settings)
        assert (logits(model, batch) - wanted).norm() < 0.03 * wanted.norm()
        report.undo()


def test_a_rotated_layer_after_a_qrelu():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(16, 32)
    wanted = model(x)
    cg.quantize_(model, 8, inputs={"bits": 8, "rotation": 32})
    cg.calibrate(model, [x], progress=False)
    assert (model(x) - wanted).norm() < 0.03 * wanted.norm()


def test_a_gated_mlp_of_adapters():
    peft = pytest.importorskip("peft")
    model, batch = built("llama")
    wanted = logits(model, batch)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    report = cg.quantize_(model, inputs={"bits": 8, "rotation": 16}, gates=8, attention=8)
    assert len(named(report, "gate and up")) == 2
    assert (logits(model, batch) - wanted).norm() < 0.03 * wanted.norm()


def test_undo_rotates_weights_back():
    model, _, report = converted("gpt2", inputs={"bits": 8, "rotation": 16})
    rotated, report = copy.deepcopy(model.state_dict()), report
    report.undo()
    original = built("gpt2")[0].state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.allclose(rotated[name], original[name])
    torch.testing.assert_close(model.state_dict(), original)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_copies_compute_the_same(family):
    model, batch, _ = converted(family)
    want = logits(model, batch)
    other = copy.deepcopy(model)
    for parameter in model.parameters():  # of which the copy has its own
        parameter.data.zero_()
    assert torch.equal(logits(other, batch), want) and not torch.equal(logits(model, batch), want)


def test_pickled_into_another_process():
    """Where transformers does not know the attention function yet."""
    model, batch, _ = converted("llama")
    want, pickled = logits(model, batch), pickle.dumps(model)
    for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        del type(interface)._global_mapping["coarsegrad_sdpa"]
    assert torch.equal(logits(pickle.loads(pickled), batch), want)


def test_a_second_call_adds_what_is_missing():
    model, batch, _ = converted("llama", gates=8)
    want = cg.quantize_(model, inputs=8, attention=8)
    assert len(named(want, "input")) == 15 and not want.skipped
    with pytest.raises(ValueError, match="gates: model has no gated MLP .* it has staircases already"):
        cg.quantize_(model, gates=8)
    again = built("llama")[0]
    cg.quantize_(again, inputs=8, gates=8, attention=8)
    assert torch.equal(logits(model, batch), logits(again, batch))


def test_filter_fn():
    keep = ("lm_head", "layers.0.mlp", "model.layers.0.self_attn", "model.norm")
    model, _ = built("llama")
    report = cg.quantize_(model, **options("llama"), filter_fn=lambda module, name: not name.endswith(keep))
    names = {s.name for s in report.staircases}
    assert "model.layers.1.self_attn" in names and "model.layers.0.mlp.up_proj" in names
    assert not any(name.endswith(keep) for name in names)


def test_a_model_with_relus_gets_both():
    config = hf.OPTConfig(
        vocab_size=64, ffn_dim=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model, ids = hf.OPTForCausalLM(config), tokens()
    report = cg.quantize_(model, 4, inputs=8, attention=8)
    assert len(report.replaced) == 1 and len(named(report, "input")) == 7
    cg.calibrate(model, [{"input_ids": ids}], progress=False)
    seen = []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids)
    assert len(seen[0].unique()) <= 16  # the levels of the QReLU, and no second staircase


def test_calibrate_and_stats_have_nothing_to_do():
    model, batch, _ = converted("llama")
    want = logits(model, batch)
    assert cg.calibrate(model, [batch], progress=False).layers == ()
    assert len(cg.stats(model, [batch], progress=False)) == 0 and str(cg.stats(model, [batch], progress=False))
    assert torch.equal(logits(model, batch), want)
    with pytest.raises(ValueError, match="model has no QReLU"):
        cg.stats(built("llama")[0], [batch], progress=False)


# ------------------------------------------------------------------------------------------ inputs


def test_layers_that_get_no_rotation_say_why():
    _, _, report = converted("qwen3", inputs={"bits": 4, "group": 16, "rotation": 16})
    notes = {s.name: (s.rotation, s.note) for s in report.staircases}
    assert notes["lm_head"] == (None, "not rotated: its weight belongs to other modules too")
    assert notes["model.layers.0.mlp.up_proj"] == (16, "")
    _, _, report = converted("vit", inputs={"bits": 4, "group": 16, "rotation": 16})
    [patches] = [s for s in report.staircases if s.name.endswith("projection")]
    assert patches.group is None and "convolution" in patches.note and "one alpha for each row" in patches.note


def test_groups_that_do_not_divide_are_skipped():
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48))
    report = cg.quantize_(model, inputs={"bits": 4, "group": 32})
    assert named(report, "input") == ["1"]
    assert [(s.name, s.why) for s in report.skipped] == [("0", "a group of 32 does not divide its 48 features")]
    with pytest.raises(ValueError, match="a group of 32 does not divide its 16 features"):
        cg.quantize_(nn.Sequential(nn.Linear(16, 16)), inputs={"bits": 4, "group": 32})


def test_attention_of_torch_is_skipped():
    model = nn.TransformerEncoderLayer(32, 2, 64, activation="gelu")
    report = cg.quantize_(model, inputs=8)
    assert [s.name for s in report.skipped] == ["self_attn.out_proj"]
    with pytest.raises(ValueError, match="apply coarsegrad.qsigned to q, k and v in its forward"):
        cg.quantize_(model, attention=8)


class _Readers(nn.Module):
    """Layers that read one tensor, which `between` may write to between them."""

    def __init__(self, between=lambda x: None):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(16, 4), nn.Linear(16, 4), between

    def forward(self, x):
        y = self.a(x)
        self.between(x)
        return y + self.b(x)


def test_a_tensor_written_to_is_staircased_again():
    model, x = _Readers(lambda x: x.mul_(3).add_(1)), torch.randn(5, 16)
    cg.quantize_(model, inputs=2)
    want = nn.functional.linear(cg.qsigned(x, None, 2), model.a.weight, model.a.bias)
    later = x * 3 + 1
    want = want + nn.functional.linear(cg.qsigned(later, None, 2), model.b.weight, model.b.bias)
    assert torch.equal(model(x.clone()), want)


def test_nothing_stays_on_the_batch():
    model, x = _Readers(), torch.randn(5, 16)
    cg.quantize_(model, inputs=8)
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        for _ in range(2):  # a staircase of the first forward has no graph in the second
            model(x).sum().backward()
            assert not vars(x)
    with torch.no_grad():
        hidden = []
        model.a.register_forward_hook(lambda module, args, y: hidden.append(args[0]))
        model(x)
    assert not vars(hidden[0]) and not vars(x)


def test_without_gradients_and_with():
    """A staircase that was made without gradients has none, and is not shared with a reader that needs them."""
    model = _Readers()
    cg.quantize_(model, inputs=8)
    leaf = torch.randn(5, 16, requires_grad=True)
    x = leaf * 2
    with torch.no_grad():
        model.a(x)
    [grad] = torch.autograd.grad(model.b(x).sum(), leaf)
    torch.testing.assert_close(grad, 2 * model.b.weight.sum(0).expand(5, 16))


def test_keyword_arguments():
    model = nn.Linear(16, 4)
    x = torch.randn(3, 16)
    cg.quantize_(model, inputs=2)
    assert torch.equal(model(input=x), model(x))
    assert torch.equal(model(x), nn.functional.linear(cg.qsigned(x, None, 2), model.weight, model.bias))


# ------------------------------------------------------------------------------------------ gates


def _t5():
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, dropout_rate=0.1, use_cache=False,
        decoder_start_token_id=0, feed_forward_proj="gated-silu",
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens()}


def _phi3():
    config = hf.Phi3Config(**GROUPED, num_hidden_layers=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return hf.Phi3ForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


def _regated():
    config = hf.LlamaConfig(**GROUPED, num_hidden_layers=1, hidden_act="relu")
    return hf.LlamaForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


def _bitnet():
    config = hf.BitNetConfig(**GROUPED, num_hidden_layers=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return hf.BitNetForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


def _grads(model, batch):
    model.train().zero_grad()
    torch.manual_seed(5)
    model(**batch).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make, found", [(_t5, 2), (_phi3, 1), (_regated, 1), (_bitnet, 1)])
def test_gated_mlps(make, found):
    """T5's dropout, Phi-3's single layer for gate and up, ReGLU and BitNet's norm before the last layer."""
    torch.manual_seed(0)
    model, batch = make()
    report = cg.quantize_(model, 4, gates=8)
    assert len(named(report, "gate and up") + named(report, "up")) == found
    want, whole = _grads(model, batch), cg.saved_memory(lambda: model(**batch).loss).total
    with cg.pack_activations_(model):
        assert all(map(torch.equal, _grads(model, batch), want))
        assert cg.saved_memory(lambda: model(**batch).loss).total < whole


class _Gated(nn.Module):
    def __init__(self, act, formula=lambda gate, up: gate * up):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.act_fn, self.formula = act, formula

    def forward(self, x):
        return self.down_proj(self.formula(self.act_fn(self.gate_proj(x)), self.up_proj(x)))


@pytest.mark.parametrize(
    "mlp, why",
    [
        (_Gated(nn.SiLU(), lambda gate, up: gate * (up + 1)), r"\* up\(x\)\) gives other values"),
        (_Gated(nn.Tanh()), "its activation is none of silu, gelu"),
    ],
)
def test_other_formulas_are_skipped(mlp, why):
    model = nn.Sequential(_Gated(nn.GELU()), mlp)
    x = torch.randn(2, 16)
    want = mlp(x)
    report = cg.quantize_(model, gates=8)
    assert named(report, "gate") == ["0"] and torch.equal(mlp(x), want)
    [skipped] = report.skipped
    assert skipped.name == "1"
    with pytest.raises(ValueError, match=why):
        cg.quantize_(nn.Sequential(mlp), gates=8)


# ------------------------------------------------------------------------------------------ attention


def test_eager_attention():
    """That is a function of the model's file. One module is left out."""
    model, batch = built("llama")
    model.set_attn_implementation("eager")
    before = logits(model, batch)
    chosen = "model.layers.1.self_attn"
    report = cg.quantize_(model, attention=2, filter_fn=lambda module, name: name == chosen)
    assert named(report, "q, k and v") == [chosen]
    assert not torch.equal(logits(model, batch), before)
    report.undo()
    assert torch.equal(logits(model, batch), before) and model.config._attn_implementation == "eager"


def test_padded_batches():
    model, batch, _ = converted("llama")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, :5] = 0
    model.train()
    want = _grads(model, batch)
    with cg.pack_activations_(model):
        assert all(map(torch.equal, _grads(model, batch), want))


def test_generation():
    """With a cache of k and v."""
    model, batch, _ = converted("llama")
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, without = (model.eval().generate(batch["input_ids"][:1], use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, without)


# ------------------------------------------------------------------------------------------ norms


class _Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_norms_are_skipped():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), _Scaled(16), nn.LayerNorm((4, 16)), nn.RMSNorm(16))
    report = cg.quantize_(model, inputs=8, norms="exact")
    assert named(report, "norm") == ["0", "4"]
    assert {s.name: s.why for s in report.skipped} == {
        "2": "it computes neither of RMSNorm and LayerNorm",
        "3": "it must be over one dimension, got [4, 16]",
    }


def test_a_norm_written_to_keeps_its_own_gradient():
    norm, layer = nn.LayerNorm(16), nn.Linear(16, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = norm, layer

        def forward(self, x):
            return self.layer(self.norm(x).mul_(2))

    model, x = Model(), torch.randn(3, 16, requires_grad=True)
    cg.quantize_(model, inputs=8, norms="coarse")
    got = torch.autograd.grad(model(x).sum(), x)[0]
    y = nn.functional.linear(cg.qsigned(norm(x) * 2, None, 8), layer.weight)
    torch.testing.assert_close(got, torch.autograd.grad(y.sum(), x)[0])


# ------------------------------------------------------------------------------------------ squared ReLU

SQUARED = {
    "nemotron": (hf.NemotronConfig, {"head_dim": 16, "num_key_value_heads": 3}),
    "arcee": (hf.ArceeConfig, {"head_dim": 16, "num_key_value_heads": 3}),
    "persimmon": (hf.PersimmonConfig, {}),
    "nanochat": (hf.NanoChatConfig, {"num_key_value_heads": 3}),
    "jais2": (hf.Jais2Config, {"num_key_value_heads": 3, "head_dim": 16}),
}


@pytest.mark.parametrize("family", SQUARED)
def test_squared_relus_are_found(family):
    """And are kept as 4 bits per element, for the layer after them too, and the mask."""
    config, more = SQUARED[family]
    model = hf.AutoModelForCausalLM.from_config(config(**TEXT, **more, num_hidden_layers=2, pad_token_id=0))
    ids = tokens()
    report = cg.quantize_(model, 4)
    assert len(report.replaced) == 2 and all("squared" in r.note for r in report.replaced)
    assert all(m.squared for m in model.modules() if isinstance(m, cg.QReLU))
    cg.calibrate(model, [{"input_ids": ids}], progress=False)
    want = _grads(model, {"input_ids": ids, "labels": ids})
    with cg.pack_activations_(model):
        assert all(map(torch.equal, _grads(model, {"input_ids": ids, "labels": ids}), want))
        report = cg.saved_memory(lambda: model(input_ids=ids, labels=ids).loss)
    kept = [
        s for s in report.storages if ".mlp." in s.module and not s.module.endswith(("up_proj", "dense_h_to_4h", "fc1"))
    ]
    elements = ids.numel() * TEXT["intermediate_size"]
    assert sum(s.bytes for s in kept) == 2 * (elements // 2 + elements // 8 + 4)  # codes, mask, alpha


def test_nemotron_h():
    """Mamba, experts, attention and an MLP: squared ReLUs in three of the four kinds of layers."""
    config = hf.NemotronHConfig(
        vocab_size=64, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=16, intermediate_size=64,
        ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=24, n_groups=2, chunk_size=8, n_routed_experts=4,
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, use_cache=False, num_logits_to_keep=16,
    )  # fmt: skip
    model, batch = hf.NemotronHForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}
    report = cg.quantize_(model, 4, inputs=8, attention=8, norms="coarse")
    assert len(report.replaced) == 4 and all("squared" in r.note for r in report.replaced)
    assert {entry.of for entry in report.staircases} == {"input", "q, k and v", "norm, coarse gradient"}
    wanted = _grads(model, batch)
    with cg.pack_activations_(model):
        assert all(map(torch.equal, _grads(model, batch), wanted))


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"inputs": 9}, ValueError, "bits must be an int in 1..8, got 9"),
        ({"inputs": 1}, ValueError, "bits must be an int in 2..8"),
        ({"inputs": "8"}, TypeError, "inputs must be None, a number of bits, or a mapping"),
        ({"inputs": {"group": 32}}, ValueError, "inputs must have the key 'bits'"),
        ({"gates": {"bits": 4, "rotation": 16}}, ValueError, "gates must have the key 'bits' and may have"),
        ({"attention": True}, TypeError, "attention must be None, a number of bits"),
        ({"attention": {"bits": 8, "group": 5}}, ValueError, "a group of 5 does not divide the 16 features of a head"),
        ({"gates": {"bits": 8, "group": 5}}, ValueError, "a group of 5 does not divide its 128 features"),
        ({"norms": "exact"}, ValueError, "inputs must be given with norms='exact'"),
        ({"inputs": 8, "norms": "fast"}, ValueError, "unknown norms 'fast', must be one of 'exact', 'coarse'"),
    ],
)
def test_bad_input(settings, error, match):
    model, batch = built("llama", layers=1)
    before = logits(model, batch)
    with pytest.raises(error, match=match):
        cg.quantize_(model, **settings)
    assert torch.equal(logits(model, batch), before)


def test_a_model_without_what_was_asked_for():
    model = nn.Sequential(nn.Linear(HIDDEN, 4))
    for settings, what in (
        ({"gates": 8}, "gates: model has no gated MLP"),
        ({"attention": 8}, "attention: model has no attention module of transformers"),
        ({"inputs": 8, "norms": "exact"}, "norms: model has no norm"),
    ):
        with pytest.raises(ValueError, match=what):
            cg.quantize_(model, **settings)
        assert not model._forward_pre_hooks and not model[0]._forward_pre_hooks
