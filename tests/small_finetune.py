"""`python -m coarsegrad finetune` on tiny models and a tiny text, for its tests."""

from __future__ import annotations

import argparse
import json
import random

import torch
import transformers

from coarsegrad.experiments import finetune

WIDTH, LENGTH, BATCH = 16, 16, 4
OPTIONS = [
    "--layers", "2", "--width", str(WIDTH), "--vocabulary", "300", "--length", str(LENGTH), "--batch-size", str(BATCH),
    "--pretrain-steps", "6", "--steps", "4", "--evaluations", "2", "--validation", "5", "--bits", "8", "1",
    "--threads", "1", "--lr", "0.01",
]  # fmt: skip


def write_texts(folder, seed):
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(20)]
    for part, size in (("train", 700), ("validation", 100)):
        (folder / part).mkdir(parents=True)
        for name in "ab":
            (folder / part / f"{name}.txt").write_text(" ".join(generator.choices(words, k=size)))
    return folder


def run(folders, out, *options):
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    threads = torch.get_num_threads()
    texts = ["--pretrain-data", str(folders[0]), "--data", str(folders[1])]
    try:
        finetune.main(parser.parse_args([*texts, "--out", str(out), *OPTIONS, *options]))
    finally:
        torch.set_num_threads(threads)


def outcome(out):
    """All numbers that must not depend on interruptions."""

    def without_times(value):
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k not in ("seconds", "step_seconds")}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    return without_times(json.loads((out / "results.json").read_text()))


def llama_folder(folder, whole):
    """The trained tokenizer with an untrained Llama, whose blocks have no ReLU."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "checkpoints" / "pretrained", local_files_only=True)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
