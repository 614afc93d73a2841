"""What the staircases of a model do, in the logs of transformers' Trainer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from transformers import Trainer, TrainerCallback

from ..nn import QReLU
from ..quantization import LiveStats


class StatsCallback(TrainerCallback):
    """Logs `StatsReport.scalars` of training steps, zero/NAME, saturated/NAME and alpha/NAME, to whatever the Trainer
    reports to: TensorBoard, Weights & Biases, `trainer.state.log_history`.

        trainer.add_callback(StatsCallback(trainer))

    trainer: a transformers.Trainer, or one of its subclasses, whose model has `QReLU`s.
    every: the inputs of every so many steps are counted, which makes those steps slower; None: `logging_steps`, so
        that what is logged with the loss is of the same step. They are logged with the next logs of the Trainer.

    The counts are those of the forwards of one step, of all its micro-batches, as for `live_stats`, whose limits hold:
    each process counts its own inputs, of which Trainer reports those of the first. Only in `trainer.training_step`,
    around which this puts its own, does the model count, so that an exception there leaves nothing in it.

    Raises TypeError or ValueError for a wrong argument; and ValueError when training starts with a model without a
    QReLU, or with `torch_compile=True`, as each counted step would be compiled anew.
    """

    def __init__(self, trainer: Any, every: int | None = None) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"every must be an int >= 1 or None, got {every!r}")
        self._trainer, self._every = trainer, every
        self._live: LiveStats | None = None
        self._scalars: dict[str, float] = {}
        self._training_step = trainer.training_step
        vars(trainer)["training_step"] = self._counted_step

    def _counted_step(self, *args: Any, **kwargs: Any) -> Any:
        """Of one micro-batch."""
        with nullcontext() if self._live is None else self._live.counting():
            return self._training_step(*args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.torch_compile:
            raise ValueError("torch_compile must be False with StatsCallback: each counted step would compile anew")
        if not any(isinstance(module, QReLU) for module in model.modules()):
            raise ValueError("the model must have a QReLU for StatsCallback; quantize_ inserts them")

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self._every or state.logging_steps  # 0 where logging_strategy="no" lets it be
        counted = every and (state.global_step + 1) % every == 0
        self._live = LiveStats(model) if counted else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is not None:
            self._scalars, self._live = self._live.report().scalars(), None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scalars, self._scalars = self._scalars, {}
        if scalars:
            self._trainer.log(scalars)
