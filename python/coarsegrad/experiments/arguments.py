"""Options and exits that the commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .._host import keep_freed_memory
from .files import ExperimentError


def positive(kind: type) -> Callable[[str], float]:
    """An argparse `type`: a finite, positive number of `kind`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # the name in argparse's message
    return parse


def share(text: str) -> float:
    """An argparse `type`: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def usable_device(name: str) -> torch.device:
    """The device named by --device, checked to work. Raises ExperimentError if it does not.

    Also disables TF32 in cuDNN's convolutions, which torch enables by default, and on a CPU has malloc keep what is
    freed, unless the environment has settings of malloc's.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        torch.backends.cudnn.allow_tf32 = False
        if device.type == "cpu":
            keep_freed_memory()
        return device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ExperimentError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def ending(command: str, saved: str) -> Iterator[None]:
    """Exit with a message and status 1 after an error of the user, and with 130 after Ctrl-C.

    saved: a sentence that says what has been saved, and where.
    """
    try:
        yield
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad {command}: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. {saved}; run the same command to continue.")
        raise SystemExit(130) from None
