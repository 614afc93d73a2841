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
from tqdm import tqdm

from ..memory import saved_memory
from ..nn import QReLU
from ..packing import pack_activations_
from ..quantization import QuantizeReport, calibrate, quantize_, stats
from . import processes
from .arguments import ending
from .checkpoints import differences
from .files import ExperimentError
from .finetune_options import (
    ALPHA_LR,
    adapters,
    add_arguments,
    check,
    of_blocks,
    of_weights,
    results_config,
    training_config,
)
from .measure import environment, interleaved_times
from .text import Texts, load_texts, shakespeare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["add_arguments", "main"]

_CALIBRATION_BATCHES = 16
_TIMED_STEPS, _TIMED_SECONDS = 20, 60  # at most, and at least 3 steps


def main(args: argparse.Namespace) -> None:
    """Run the command. Exits with a message and status 1 for an error of the user, with 130 after Ctrl-C."""
    with ending("finetune", f"Finished steps are saved in {args.out}"), processes.joined(args.device) as device:
        _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> None:
    try:
        from . import finetune_report, language
    except ImportError as error:
        raise ExperimentError(
            f"needs transformers and matplotlib ({error}): pip install transformers matplotlib, the packages of the "
            "extra finetune"
        ) from error
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    language.transformers.utils.logging.disable_progress_bar()
    with processes.in_turn():
        texts = {"data": load_texts(args.data) if args.data else shakespeare()[1]}
        if not args.model:
            folder = args.pretrain_data
            texts["pretrain_data"] = load_texts(folder, "--pretrain-data") if folder else shakespeare()[0]
    results = _results(args, texts)
    names = ["float", *(f"{bits}bit" for bits in args.bits)]
    kinds = [bits for bits in args.bits if args.by_kind and str(bits) not in results.get("by_kind", {})]
    if kinds or any(name not in results["runs"] for name in names):
        (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not args.model:
            results["pretraining"], source = _pretrain(args, texts["pretrain_data"], device)
        job = _Job(args, args.model or str(source), texts["data"], device)
        for name, bits in zip(names, [None, *args.bits]):
            if name not in results["runs"]:
                results["runs"][name] = job.run(name, bits)
                if processes.rank() == 0:
                    finetune_report.save(results, args.out)
        for bits in kinds:
            results.setdefault("by_kind", {})[str(bits)] = job.by_kind(bits)
            if processes.rank() == 0:
                finetune_report.save(results, args.out)
    if processes.rank() == 0:
        finetune_report.write(results, args.out)
    print(f"\n{finetune_report.summary(results)}\n")
    print(*(args.out / name for name in finetune_report.FILES), sep="\n")


def _results(args: argparse.Namespace, texts: dict[str, Texts]) -> dict:
    """The existing results, or empty ones."""
    config = results_config(args, texts)
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


def _pretrain(args: argparse.Namespace, texts: Texts, device: torch.device) -> tuple[list[dict], Path]:
    """Pretrain the small OPT, or load it. Returns its history, and the folder of the model and its tokenizer."""
    from . import language

    config = training_config(
        args, "pretraining", args.pretrain_steps, lr=args.pretrain_lr, layers=args.layers, width=args.width,
        vocabulary=args.vocabulary, data=texts.sha256,
    )  # fmt: skip
    tokenizer = language.train_tokenizer(texts.train, args.vocabulary)
    train, validation = _blocks(args, tokenizer, texts, "pretraining", device)

    def new() -> nn.Module:
        torch.manual_seed(args.seed)
        return language.small_opt(tokenizer, args.layers, args.width, args.length).to(device)

    batch = processes.share(train[: args.batch_size])
    trained = processes.parallel(new(), args.parallel, lambda model: language.next_token_loss(model, batch))
    optimizer = language.make_optimizer(trained, args.pretrain_lr)
    history = language.fit(trained, optimizer, train, validation, config, args.out / "checkpoints" / "pretraining.pt")
    model: Any = processes.local(trained, new)
    folder = args.out / "checkpoints" / "pretrained"
    if processes.rank() == 0:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    processes.wait()
    return history, folder


def _blocks(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, texts: Texts, what: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    from . import language

    train = language.blocks(tokenizer, texts.train, args.length, what)
    if len(train) < processes.count():
        raise ExperimentError(
            f"the {what} text is {len(train)} blocks of --length {args.length}, less than one for each of "
            f"{processes.count()} processes"
        )
    validation = language.blocks(tokenizer, texts.validation, args.length, "validation")
    return train.to(device), language.evenly(validation, args.validation).to(device)


_OPTIONS = {"input": "inputs", "gate and up": "gates", "q, k and v": "attention"}  # of quantize_, by a report's words


class _Job:
    """Fine-tuning of one model on one text, once for each number of bits."""

    def __init__(self, args: argparse.Namespace, source: str, texts: Texts, device: torch.device) -> None:
        from . import language

        self._args, self._device, self._language = args, device, language
        with processes.in_turn():
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
            more |= of_blocks(args) | of_weights(args)
        config = training_config(args, name, args.steps, **more, **adapters(args))
        model = self._trainable(bits)
        result: dict = {"bits": bits}
        if bits:
            if _alphas(model):
                self._calibrate(model)
            result["logits"] = self._closeness(model)
        calibrated = _alphas(model)
        batch = processes.share(self._train[: args.batch_size])
        trained = self._parallel(model, batch)
        optimizer = language.make_optimizer(trained, args.lr, self._alpha_lr(calibrated), args.rho if bits else None)
        checkpoint = args.out / "checkpoints" / f"{name}.pt"
        result["history"] = language.fit(trained, optimizer, self._train, self._validation, config, checkpoint)
        model = processes.local(trained, lambda: self._trainable(bits))
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
            result["step_seconds"] = self._step_seconds(trained, optimizer, batch)
        elif not args.blocks:
            result["silent_loss"] = self._silent_loss()
        return result | {"environment": environment(self._device)}

    def by_kind(self, bits: int) -> dict[str, float]:
        """The perplexity before training with one kind of staircase alone, and with "none": in front of the layers of
        one name, in gated MLPs, or in attention; or with quantized weights alone."""
        report = self._quantize(copy.deepcopy(self._start), bits)
        kinds: dict[str, tuple[str, set[str]]] = {}
        for staircase in report.staircases:
            if option := _OPTIONS.get(staircase.of):
                kind = staircase.name.rpartition(".")[2] if option == "inputs" else staircase.of
                kinds.setdefault(kind, (option, set()))[1].add(staircase.name)
        found = {"none": self._perplexity(self._start)}
        for kind, only in tqdm(kinds.items(), f"{bits}bit, by kind", unit="kind", leave=False, disable=None):
            model = copy.deepcopy(self._start)
            self._quantize(model, bits, only)
            found[kind] = self._perplexity(model)
        if of_weights(self._args):
            model = copy.deepcopy(self._start)
            self._quantize_weights(model)
            found["weights"] = self._perplexity(model)
        return found

    def _perplexity(self, model: nn.Module) -> float:
        return math.exp(self._language.validation_loss(model, self._validation, self._args.batch_size))

    def _quantize(self, model: nn.Module, bits: int, only: tuple[str, set[str]] | None = None) -> QuantizeReport:
        """only: (an option of `quantize_` for blocks, the modules to convert by it); None for all."""
        args = self._args
        settings: dict[str, Any] = {"ste": args.ste, "rounding": args.rounding, "learn_alpha": not args.fixed_alpha}
        if args.blocks:
            blocks = {
                "inputs": {"bits": bits, "group": args.group, "rotation": args.rotation}, "norms": args.norms,
                "gates": {"bits": max(bits, args.gate_bits or 0), "group": args.group},
                "attention": max(bits, args.attention_bits),
            }  # fmt: skip
            option, names = only or (None, set())
            settings |= blocks if option is None else {option: blocks[option]}
            # The logits' layer, and an adapter's second matrix, which reads a few numbers, stay as they are.
            settings["filter_fn"] = lambda module, name: (
                name in names if option else "lm_head" not in name and "lora_B" not in name
            )
        try:
            return quantize_(model, bits, **settings)
        except ValueError as error:
            what = "cannot be quantized" if args.blocks else "has no ReLU"
            raise ExperimentError(f"--model {args.model} {what}: {error}") from error

    def _trainable(self, bits: int | None) -> nn.Module:
        """A copy of the float model, to be trained; with bits, converted and packed."""
        model = copy.deepcopy(self._start)
        if self._args.lora is not None:
            torch.manual_seed(self._args.seed)  # of the adapters' weights
            model = self._language.with_lora(model, self._args.lora)
        if bits:
            self._quantize(model, bits)
            self._quantize_weights(model)
            pack_activations_(model)
        return model

    def _quantize_weights(self, model: nn.Module) -> None:
        """Those of the layers but the last, and those of the last, as asked for; not those of adapters."""
        args = self._args
        if args.weight_bits:
            try:
                quantize_(model, None, weight_bits=args.weight_bits, filter_fn=lambda _, name: "lora_" not in name)
            except ValueError as error:
                raise ExperimentError(f"--model {args.model} cannot have quantized weights: {error}") from error
        if args.head_bits:
            self._language.quantize_head(model, args.head_bits)

    def _parallel(self, model: nn.Module, batch: Tensor) -> nn.Module:
        return processes.parallel(model, self._args.parallel, lambda m: self._language.next_token_loss(m, batch))

    def _calibrate(self, model: nn.Module) -> None:
        """Each process calibrates on its share of the first batches; all get the same alphas."""
        used = self._train[: _CALIBRATION_BATCHES * self._args.batch_size]
        share = used[processes.rank() :: processes.count()]
        batches = share.split(self._args.batch_size // processes.count())
        calibrate(model, ({"input_ids": batch} for batch in batches))

    def _alpha_lr(self, alphas: dict[str, float]) -> float | None:
        relative = self._args.alpha_lr or ALPHA_LR * self._args.lr
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
        other = self._parallel(self._trainable(None).train(), batch)
        pairs = {"float": (other, language.make_optimizer(other, self._args.lr)), "quantized": (model, optimizer)}
        steps = {name: lambda pair=pair: language.train_step(*pair, batch) for name, pair in pairs.items()}
        (first,) = interleaved_times({"quantized": steps["quantized"]}, 1, self._device)["quantized"]
        first = processes.mean(torch.tensor(first, device=self._device)).item()  # the same rounds in all processes
        rounds = min(_TIMED_STEPS, max(3, round(_TIMED_SECONDS / (2 * first))))
        times = interleaved_times(steps, rounds, self._device)
        return {name: statistics.median(seconds) for name, seconds in times.items()}


def _alphas(model: nn.Module) -> dict[str, float]:
    return {name: module.alpha.item() for name, module in model.named_modules() if isinstance(module, QReLU)}
