"""The training loop: SGD with momentum, a checkpoint after every epoch, and bit-exact resuming.

Everything random in an epoch depends only on (seed, phase, epoch), so a resumed run computes what an uninterrupted one
does; on a CPU bit for bit, given the same number of threads.

On a GPU a small network's step is dominated by launch overhead, so it is captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..optim import blended, keep_positive, param_groups
from .checkpoints import load_checkpoint, save_checkpoint, seed_of
from .data import Split
from .files import ExperimentError

# A learned alpha sums its gradient over a whole layer, so its learning rate is this fraction of the weights'.
ALPHA_LR = 0.01

_EVALUATION_BATCH = 1000

# On a GPU, reading the totals synchronizes: it is done every this many batches.
_READ_EVERY = 50
# Steps at the same rates before one is captured, so that one-time allocations such as momenta are done.
_WARM_UP_STEPS = 3
_CAPTURING = threading.Lock()


class Diverged(ExperimentError):
    """The loss is not finite; `history` has the epochs before."""

    def __init__(self, message: str, history: list[dict]) -> None:
        super().__init__(message)
        self.history = history


def make_optimizer(model: nn.Module, lr: float, rho: float | None = None) -> torch.optim.Optimizer:
    """SGD with momentum 0.9 and rate `lr`; learned alphas have rate `ALPHA_LR * lr` and stay positive. With `rho`,
    quantized weights are blended before each step."""
    sgd = torch.optim.SGD(param_groups(model, lr, alpha_lr=ALPHA_LR * lr), momentum=0.9)
    optimizer = keep_positive(sgd, model)
    return optimizer if rho is None else blended(optimizer, model, rho)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step on a batch. Returns its mean loss and the number of correct predictions before the step."""
    optimizer.zero_grad()
    output = model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    optimizer.step()
    return loss.detach(), (output.argmax(1) == y).sum()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean loss and accuracy, as a fraction, in evaluation mode."""
    model.eval()
    loss, right = 0.0, 0
    for x, y in zip(*(part.split(_EVALUATION_BATCH) for part in split), strict=True):
        output = model(x)
        loss += F.cross_entropy(output, y, reduction="sum").item()
        right += (output.argmax(1) == y).sum().item()
    return loss / len(split.y), right / len(split.y)


def fit(
    model: nn.Module,
    train: Split,
    test: Split,
    config: dict,
    checkpoint: Path,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
    name: str = "",
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[dict]:
    """Train `model` in place and return its history, one dict per epoch. `name` is a prefix of each line printed.

    `config` has phase, epochs, batch_size, lr, seed, and everything else that results depend on. With "lr_drops", a
    list of epochs, lr is divided by 10 after each of them; otherwise it decays to 0 along half a cosine. With "rho",
    steps are blended. If `checkpoint` exists, training continues from there, or ends at once if it is complete. An
    epoch uses every sample once, except an incomplete last batch; `augment` transforms a batch before its step.
    `before_epoch` is called with the number of completed epochs. It may change what a step does only when lr drops,
    because a step captured on a GPU is only recaptured then.

    Raises ExperimentError if the checkpoint has another configuration or cannot be read, or if the training set is
    smaller than one batch, and Diverged if the loss is not finite; the checkpoint keeps the finished epochs.
    """
    batches = len(train.y) // config["batch_size"]
    if batches == 0:
        raise ExperimentError(f"--batch-size {config['batch_size']} is more than the {len(train.y)} training images")
    optimizer = make_optimizer(model, config["lr"], config.get("rho"))
    scheduler = LambdaLR(optimizer, _lr_factor(batches, config["epochs"], config.get("lr_drops")))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    history = load_checkpoint(checkpoint, config, parts)
    steps = _Steps(model, optimizer, train.x.device)

    for epoch in range(len(history), config["epochs"]):
        start = time.perf_counter()
        before_epoch(epoch)
        seed = seed_of(config["seed"], config["phase"], epoch)
        torch.manual_seed(seed)
        order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
        title = f"{name}{config['phase']} {epoch + 1}/{config['epochs']}"
        loss, accuracy = _train_epoch(title, steps, scheduler, train, order, config["batch_size"], augment)
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} in {title}: training diverged; try a lower --lr", history)
        seconds = time.perf_counter() - start
        test_loss, test_accuracy = evaluate(model, test)
        history.append(
            {
                "epoch": epoch + 1,
                "loss": loss,
                "accuracy": accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
            }
        )
        save_checkpoint(checkpoint, config, parts, history)
        print(
            f"{title}  loss {loss:.4f}  training {accuracy:.2%}  test {test_accuracy:.2%}  {seconds:.1f} s",
            flush=True,
        )
    return history


def _lr_factor(batches: int, epochs: int, drops: Sequence[int] | None) -> Callable[[int], float]:
    if drops is None:
        return lambda step: (1 + math.cos(math.pi * step / (batches * epochs))) / 2
    return lambda step: 0.1 ** sum(step >= batches * epoch for epoch in drops)


class _Steps:
    """Steps of a model on batches of one size; `totals` is float64 [sum of losses, number of correct predictions].

    On a GPU they run on their own stream. Once the optimizer's rates have not changed for some steps, a step is
    captured, and replayed until they do.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rates: list[float] = []
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def epoch(self) -> Iterator[None]:
        """A block in which the totals start at 0. Reading them waits for the steps before."""
        self._model.train()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self.totals.zero_()
            yield

    def __call__(self, x: Tensor, y: Tensor) -> None:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if rates != self._rates:
            self._rates, self._eager_steps, self._graph = rates, 0, None
        if self._stream is None or self._eager_steps < _WARM_UP_STEPS:
            self._eager_steps += 1
            self._step(x, y)
            return
        if self._graph is None:
            self._graph, self._batch = torch.cuda.CUDAGraph(), (x.clone(), y.clone())
            # Other threads may train as well: a capture restricts this thread only, but two must not overlap.
            with _CAPTURING, torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._step(*self._batch)
        for static, given in zip(self._batch, (x, y)):
            static.copy_(given)
        self._graph.replay()

    def _step(self, x: Tensor, y: Tensor) -> None:
        loss, right = train_step(self._model, self._optimizer, x, y)
        self.totals += torch.stack([loss.double() * len(y), right.double()])


def _train_epoch(
    title: str,
    steps: _Steps,
    scheduler: LambdaLR,
    train: Split,
    order: Tensor,
    batch_size: int,
    augment: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """Mean loss and accuracy of the epoch; ends early if the loss is not finite."""
    order = order.to(train.y.device)
    batches = len(order) // batch_size
    every = 1 if train.y.device.type == "cpu" else _READ_EVERY
    with tqdm(total=batches, desc=title, unit="batch", leave=False, disable=None) as bar, steps.epoch():
        for number, indices in enumerate(order[: batches * batch_size].split(batch_size), 1):
            steps(augment(train.x[indices]), train.y[indices])
            scheduler.step()
            if number % every == 0 or number == batches:
                loss, right = (total / (number * batch_size) for total in steps.totals.tolist())
                if not math.isfinite(loss):
                    break
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {right:.2%}", refresh=False)
            bar.update()
    return loss, right
