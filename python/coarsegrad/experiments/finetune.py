"""`python -m coarsegrad finetune`: a language model with ReLU, fine-tuned in float and with low-bit activations."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import nn

from .arguments import positive
from .files import ExperimentError
from .text import Texts, load_texts, shakespeare

_WEIGHT_DECAY = 0.1

_DESCRIPTION = """
"""
_EPILOG = """
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m coarsegrad finetune` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--pretrain-steps", type=positive(int), default=1600, metavar="N", help="of our own model (default 1600)")
    add("--pretrain-lr", type=positive(float), default=2e-3, metavar="RATE", help="its learning rate (default 0.002)")
    add("--pretrain-data", type=Path, metavar="FOLDER",
        help="train/*.txt and validation/*.txt to pretrain on (default: Shakespeare in modern spelling)")
    add("--layers", type=positive(int), default=4, metavar="N", help="of our own model (default 4)")
    add("--width", type=positive(int), default=192, metavar="N", help="of our own model (default 192)")
    add("--vocabulary", type=positive(int), default=2048, metavar="N", help="tokens of our own model (default 2048)")
    add("--data", type=Path, metavar="FOLDER",
        help="train/*.txt and validation/*.txt to fine-tune on (default: Shakespeare's plays as printed in 1623)")
    add("--evaluations", type=positive(int), default=10, metavar="N",
        help="how often each training is evaluated and a checkpoint written (default 10)")
    add("--batch-size", type=positive(int), default=16, metavar="N", help="blocks a step (default 16)")
    add("--length", type=positive(int), default=128, metavar="N", help="tokens of a block (default 128)")
    add("--validation", type=positive(int), default=512, metavar="N", help="blocks at most (default 512)")
    add("--seed", type=int, default=0, help="of the weights and the order of the blocks (default 0)")
    add("--device", default="cpu", help="as torch names it: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add("--out", type=Path, default=Path("runs/finetune"), metavar="FOLDER",
        help="checkpoints and results (default runs/finetune)")


def main(args: argparse.Namespace) -> None:
    """Runs the command; ends it with a message and status 1 for what the user can mend, 130 after Ctrl-C."""
    try:
        _run(args)
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad finetune: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. What was done is kept in {args.out}; the same command goes on from there.")
        raise SystemExit(130) from None


def _run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    history, folder = _pretrain(args, shakespeare()[0], device)


def _common(args: argparse.Namespace, steps: int, device: torch.device) -> dict:
    """What decides the numbers of every training."""
    names = ("batch_size", "length", "validation", "seed")
    return {name: getattr(args, name) for name in names} | {
        "steps": steps, "every": math.ceil(steps / args.evaluations), "weight_decay": _WEIGHT_DECAY, "device": str(device), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _pretrain(args: argparse.Namespace, texts: Texts, device: torch.device) -> tuple[list[dict], Path]:
    """(history, the folder of the model and its tokenizer)"""
    from . import language

    folder = args.out / "checkpoints" / "pretrained"
    config = {"phase": "pretraining", "lr": args.pretrain_lr, "layers": args.layers,
              "width": args.width, "vocabulary": args.vocabulary, "data": texts.sha256}  # fmt: skip
    config |= _common(args, args.pretrain_steps, device)
    tokenizer = language.train_tokenizer(texts.train, args.vocabulary)
    torch.manual_seed(args.seed)
    model = language.small_opt(tokenizer, args.layers, args.width, args.length).to(device)
    train = language.blocks(tokenizer, texts.train, args.length, "pretraining")
    validation = language.blocks(tokenizer, texts.validation, args.length, "validation")
    validation = language.evenly(validation, args.validation).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.pretrain_lr, weight_decay=_WEIGHT_DECAY)
    history = language.fit(model, optimizer, train.to(device), validation, config,
                           args.out / "checkpoints" / "pretrain.pt")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return history, folder
