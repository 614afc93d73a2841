"""Causal language models: tokens, a small OPT, loading a pretrained model, perplexity and the training loop.

Everything random in a step depends only on (seed, step), so a resumed run computes what an uninterrupted one does; on a
CPU bit for bit, given the same number of threads. Under torchrun, each process computes its share of every batch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..optim import blended, keep_positive, param_groups
from ..parametrization import QWeight
from . import processes, smollm2
from .checkpoints import load_checkpoint, save_checkpoint, seed_of
from .files import ExperimentError

_END = "</s>"
WEIGHT_DECAY = 0.1
_CLIP = 1.0  # norm of the gradient
_WARMUP = 0.05  # of the steps


# ------------------------------------------------------------------------------------------ tokens


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with at most `vocabulary` tokens; as in OPT, a text starts with `</s>`."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", _END], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{_END} $A", special_tokens=[(_END, bpe.token_to_id(_END))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=_END, eos_token=_END, unk_token=_END, pad_token="<pad>"
    )


def blocks(tokenizer: transformers.PreTrainedTokenizerBase, texts: Sequence[str], length: int, what: str) -> Tensor:
    """The concatenated texts as tokens, int64 [N, length]; an incomplete last block is dropped.

    Raises ExperimentError if there is no complete block.
    """
    tokens = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    n = len(tokens) // length
    if n == 0:
        raise ExperimentError(f"the {what} text is {len(tokens)} tokens, less than one block of --length {length}")
    return torch.tensor(tokens[: n * length], dtype=torch.int64).view(n, length)


def evenly(x: Tensor, n: int) -> Tensor:
    """At most n rows of x, evenly spaced."""
    return x if len(x) <= n else x[torch.arange(n) * len(x) // n]


# ------------------------------------------------------------------------------------------ models


def small_opt(tokenizer: transformers.PreTrainedTokenizerBase, layers: int, width: int, positions: int) -> nn.Module:
    """An OPT with random weights and no dropout, whose feed-forward has 4 times the width."""
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=width, word_embed_proj_dim=width, num_hidden_layers=layers,
        ffn_dim=4 * width, num_attention_heads=max(1, width // 64), max_position_embeddings=positions, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return without_cache(transformers.OPTForCausalLM(config))


def load_pretrained(name: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The causal language model, in float32, and the tokenizer: "smollm2", a folder, or an id that transformers can
    download.

    Raises ExperimentError if they cannot be loaded, or if the model is not a decoder-only language model.
    """
    if name == smollm2.NAME:
        return _load_smollm2()
    local = {"local_files_only": Path(name).is_dir()}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **local)
        if config.is_encoder_decoder:
            raise ExperimentError(
                f"--model {name} is a {config.model_type}, which has an encoder and a decoder; wanted a model that "
                "AutoModelForCausalLM loads"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **local)
    except (OSError, ValueError, KeyError) as error:
        raise ExperimentError(
            f"--model {name} is neither a folder with a model and its tokenizer nor the id of a model: {error}"
        ) from error
    return without_cache(model), tokenizer


def _load_smollm2() -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise ExperimentError(f"--model {smollm2.NAME} needs the package gguf: pip install gguf")
    file = smollm2.smollm2()
    source: Any = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    return without_cache(model), tokenizer


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model with frozen weights and an adapter of this rank on every Linear of its blocks."""
    try:
        import peft
    except ImportError as error:
        raise ExperimentError(f"--lora needs peft ({error}): pip install peft") from error
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def quantize_head(model: nn.Module, bits: Literal[8, 4, 2, 1]) -> None:
    """Give the output layer weights of `bits` bits, and the embedding too if that shares them.

    Raises ExperimentError if there is no output layer.
    """
    transformer: Any = next((m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)), None)
    head = transformer and transformer.get_output_embeddings()
    if head is None:
        raise ExperimentError(f"--head-bits needs a model with an output layer, got a {type(model).__name__}")
    weight = head.weight
    for module in list(model.modules()):
        if module._parameters.get("weight") is weight:
            register_parametrization(module, "weight", QWeight(bits))


def without_cache(model: nn.Module) -> nn.Module:
    """The model, configured not to return keys and values for generation."""
    config: Any = model.config
    config.use_cache = False
    return model


def digest(model: nn.Module) -> str:
    """The sha256 of all parameters and buffers."""
    sha256 = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()


# ------------------------------------------------------------------------------------------ training


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean of -log p(next token), for tokens [B, T]."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, tokens: Tensor, batch_size: int) -> float:
    """Mean of -log p(next token) over all blocks [N, T], in evaluation mode; its exp is the perplexity."""
    model.eval()
    total = 0.0
    for batch in tokens.split(batch_size):
        total += processes.mean(next_token_loss(model, processes.share(batch))).item() * len(batch)
    return total / len(tokens)


def batch_of(tokens: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The blocks of a step, 0, 1, ...: every block once per epoch, in a new order in each epoch."""
    places = range(step * batch_size, (step + 1) * batch_size)
    chosen = []
    for epoch, group in itertools.groupby(places, lambda place: place // len(tokens)):
        generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
        order = torch.randperm(len(tokens), generator=generator)
        chosen += [order[place % len(tokens)] for place in group]
    return tokens[torch.stack(chosen).to(tokens.device)]


def make_optimizer(
    model: nn.Module, lr: float, alpha_lr: float | None = None, rho: float | None = None
) -> torch.optim.Optimizer:
    """AdamW, with learned alphas in a second group with rate `alpha_lr` and no weight decay. With `rho`, quantized
    weights are blended before each step."""
    groups = param_groups(model, lr, WEIGHT_DECAY, alpha_lr=alpha_lr)
    optimizer = keep_positive(torch.optim.AdamW(groups), model)
    return optimizer if rho is None else blended(optimizer, model, rho)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """One step on blocks [B, T], with the gradient norm of the weights clipped. Returns the loss before the step."""
    optimizer.zero_grad()
    loss = next_token_loss(model, tokens)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], _CLIP)
    optimizer.step()
    return loss.detach()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Tensor,
    validation: Tensor,
    config: dict,
    checkpoint: Path,
) -> list[dict]:
    """Train `model` in place and return its history: a dict for step 0 and one after every `every` steps.

    `config` has phase, steps, every, batch_size, seed, and everything else that results depend on. Each group's rate
    warms up and then decays to 0 along half a cosine. If `checkpoint` exists, training continues from there, or ends at
    once if it is complete.

    Raises ExperimentError if the checkpoint has another configuration or cannot be read, or if the loss is not finite;
    the checkpoint keeps what was done until then.
    """
    phase, steps, every, batch_size = (config[name] for name in ("phase", "steps", "every", "batch_size"))
    scheduler = LambdaLR(optimizer, _rate(steps))
    parts = {"model": processes.unwrapped(model), "optimizer": optimizer, "scheduler": scheduler}
    history = load_checkpoint(checkpoint, config, parts)
    if not history:
        history = [{"step": 0, "loss": None, "validation_loss": validation_loss(model, validation, batch_size)}]
        save_checkpoint(checkpoint, config, parts, history)
        _report(phase, steps, history[0])
    step = history[-1]["step"]
    with tqdm(total=steps, initial=step, desc=phase, unit="step", leave=False, disable=None) as bar:
        while step < steps:
            start, total, first = time.perf_counter(), 0.0, step
            torch.manual_seed(seed_of(config["seed"], step) ^ processes.rank())
            model.train()
            while step < min(first + every, steps):
                batch = processes.share(batch_of(train, step, batch_size, config["seed"]))
                loss = processes.mean(train_step(model, optimizer, batch)).item()
                if not math.isfinite(loss):
                    raise ExperimentError(
                        f"the loss is {loss} in step {step + 1} of {phase}: training diverged; try a lower rate"
                    )
                scheduler.step()
                total, step = total + loss, step + 1
                bar.set_postfix_str(f"loss {total / (step - first):.4f}", refresh=False)
                bar.update()
            seconds = time.perf_counter() - start
            history.append({
                "step": step, "loss": total / (step - first),
                "validation_loss": validation_loss(model, validation, batch_size), "seconds": seconds,
            })  # fmt: skip
            save_checkpoint(checkpoint, config, parts, history)
            _report(phase, steps, history[-1])
    return history


def _rate(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(_WARMUP * steps))
    return lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def _report(phase: str, steps: int, row: dict) -> None:
    training = "" if row["loss"] is None else f"  training loss {row['loss']:.4f}  {row['seconds']:.0f} s"
    perplexity = math.exp(row["validation_loss"])
    print(f"{phase} {row['step']}/{steps}  validation perplexity {perplexity:.3f}{training}", flush=True)
