"""What `python -m coarsegrad rounding` converts: networks, their data, and how to train and evaluate them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization import calibrate, quantize_
from . import training
from .data import Mnist
from .models import lenet5, resnet14
from .text import Texts

FLOAT_LR = {"lenet": 0.05, "resnet": 0.05, "opt": 2e-3}
LR = {"lenet": 0.01, "resnet": 0.01, "opt": 5e-4}  # of the fine-tuning; decays to 0 along half a cosine
_IMAGES = {"lenet": lenet5, "resnet": resnet14}
_BATCH = 64
_CALIBRATION, _TEST = 512, 5000  # images

# The language model: an OPT of 3 layers of width 128.
_LAYERS, _WIDTH, _VOCABULARY, _LENGTH, _BLOCKS = 3, 128, 1024, 128, 8
_VALIDATION = 128  # blocks


class Task(ABC):
    """A network trained in float, `start`, and what is done with its copies."""

    start: nn.Module
    history: list[dict]  # of the training in float
    calibration: list[Tensor]  # inputs, batch by batch

    @abstractmethod
    def train(self, model: nn.Module, name: str, steps: int, lr: float, checkpoint: Path) -> list[dict]:
        """Train in place, by `fit`. All runs except "float" see the same batches in the same order."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out data, and the score: accuracy in percent, or perplexity."""

    @abstractmethod
    def score(self, row: dict) -> dict[str, float]:
        """Loss and score in a row of a training history."""

    @abstractmethod
    def loss(self, model: nn.Module) -> Tensor:
        """The loss of one training step."""

    @abstractmethod
    def logits(self, model: nn.Module, x: Tensor) -> Tensor: ...

    def converted(self, bits: int, rounding: str, ste: str, corrected: bool = False) -> nn.Module:
        """A copy of `start` with QReLUs and calibrated alphas."""
        model = copy.deepcopy(self.start)
        quantize_(model, bits, rounding=rounding, ste=ste)
        forward: Any = self.logits  # of what `calibration` has
        calibrate(model, self.calibration, forward=forward, progress=False)
        if corrected:
            correct_means_(model, self.start, lambda m: self.logits(m, torch.cat(self.calibration)))
        return model

    @torch.no_grad()
    def output_error(self, model: nn.Module) -> float:
        """Relative error of the logits, in norm, with respect to those of `start`, on the calibration data."""
        x = torch.cat(self.calibration)
        before, after = (self.logits(m.eval(), x).double() for m in (self.start, model))
        return ((after - before).norm() / before.norm()).item()


@torch.no_grad()
def correct_means_(model: nn.Module, reference: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Change the biases of the Linears and convolutions of `model`, layer by layer, so that their channel means in
    `run(model)` are those in `run(reference)`. Nagel et al. 2019, arXiv 1906.04721, section 4.2."""
    wanted: dict[str, Tensor] = {}
    layers, handles = (nn.Linear, nn.Conv2d), []

    def mean(layer: nn.Module, y: Tensor) -> Tensor:
        return y.movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2).mean(0)

    def record(name: str) -> Callable:
        return lambda layer, args, y: wanted.__setitem__(name, mean(layer, y))

    def correct(name: str) -> Callable:
        def hook(layer: nn.Linear | nn.Conv2d, args: tuple, y: Tensor) -> Tensor:
            shift = wanted[name] - mean(layer, y)
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
            return y + (shift if isinstance(layer, nn.Linear) else shift[:, None, None])

        return hook

    for network, hook in ((reference, record), (model, correct)):
        network.eval()
        handles = [
            module.register_forward_hook(hook(name))
            for name, module in network.named_modules()
            if isinstance(module, layers) and not _tied(network, module)
        ]
        run(network)
        for handle in handles:
            handle.remove()


def _tied(network: nn.Module, layer: nn.Module) -> bool:
    """Whether another module shares the weight, as in a language model's head, which gets no bias."""
    return sum(getattr(module, "weight", None) is layer.weight for module in network.modules()) > 1


class Images(Task):
    """LeNet-5 or a ResNet on MNIST."""

    def __init__(self, name: str, mnist: Mnist, steps: int, seed: int, checkpoint: Path) -> None:
        self._mnist, self._seed, self._name = mnist._replace(test=mnist.test.first(_TEST)), seed, name
        images = mnist.train.x[:_CALIBRATION]
        self.calibration = list(images.split(len(images) // 4 or 1))
        torch.manual_seed(seed)
        self.start = _IMAGES[name](nn.ReLU).to(mnist.train.x.device)
        self.history = self.train(self.start, "float", steps, FLOAT_LR[name], checkpoint)

    def train(self, model: nn.Module, name: str, steps: int, lr: float, checkpoint: Path) -> list[dict]:
        train, test = self._mnist.train, self._mnist.test
        epochs = math.ceil(steps * _BATCH / len(train.y))
        config = {
            "phase": "float" if name == "float" else "tuning", "epochs": epochs, "steps": steps, "lr": lr,
            "batch_size": _BATCH, "seed": self._seed, "threads": torch.get_num_threads(),
            "data": self._mnist.sha256,
        }  # fmt: skip
        train = train.first(steps * _BATCH // epochs)
        return training.fit(model, train, test, config, checkpoint, name=f"{self._name} {name}: ")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        loss, accuracy = training.evaluate(model, self._mnist.test)
        return self.score({"test_loss": loss, "test_accuracy": accuracy})

    def score(self, row: dict) -> dict[str, float]:
        return {"loss": row["test_loss"], "score": 100 * row["test_accuracy"]}

    def loss(self, model: nn.Module) -> Tensor:
        x, y = self._mnist.train.first(_BATCH)
        return F.cross_entropy(model(x.clone()), y)

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x)


class Text(Task):
    """A small OPT; fine-tuning continues on the same text."""

    def __init__(self, texts: Texts, steps: int, seed: int, checkpoint: Path, device: torch.device) -> None:
        from . import language

        self._language, self._seed, self._data = language, seed, texts.sha256
        tokenizer = language.train_tokenizer(texts.train, _VOCABULARY)
        self._train = language.blocks(tokenizer, texts.train, _LENGTH, "training").to(device)
        validation = language.blocks(tokenizer, texts.validation, _LENGTH, "validation")
        self._validation = language.evenly(validation, _VALIDATION).to(device)
        self.calibration = list(language.evenly(self._train, 4 * _BLOCKS).split(_BLOCKS))
        torch.manual_seed(seed)
        self.start = language.small_opt(tokenizer, _LAYERS, _WIDTH, _LENGTH).to(device)
        self.history = self.train(self.start, "float", steps, FLOAT_LR["opt"], checkpoint)

    def train(self, model: nn.Module, name: str, steps: int, lr: float, checkpoint: Path) -> list[dict]:
        every = math.ceil(steps / 4) if name == "float" else steps
        config = {
            "phase": f"opt {name}", "steps": steps, "every": every, "batch_size": _BLOCKS, "lr": lr,
            "seed": self._seed + (name != "float"), "threads": torch.get_num_threads(), "data": self._data,
        }  # fmt: skip
        optimizer = self._language.make_optimizer(model, lr)
        return self._language.fit(model, optimizer, self._train, self._validation, config, checkpoint)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.score({"validation_loss": self._language.validation_loss(model, self._validation, _BLOCKS)})

    def score(self, row: dict) -> dict[str, float]:
        return {"loss": row["validation_loss"], "score": math.exp(row["validation_loss"])}

    def loss(self, model: nn.Module) -> Tensor:
        return self._language.next_token_loss(model, self._train[:_BLOCKS])

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(input_ids=x).logits
