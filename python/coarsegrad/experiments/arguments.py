"""What the commands' options have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .files import ExperimentError


def positive(kind: type) -> Callable[[str], float]:
    """The `type` of an option that takes a number of `kind`, finite and above 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # what argparse calls it in its message
    return parse


def usable_device(name: str) -> torch.device:
    """What --device `name` means, tried out; an ExperimentError if it cannot be used.

    From here on float32 is float32 on a GPU as well: torch's convolutions would take TF32, of 10 bits.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        torch.backends.cudnn.allow_tf32 = False
        return device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ExperimentError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def ending(command: str, kept: str) -> Iterator[None]:
    """Ends the command with a message and status 1 for what the user can mend, and with 130 after Ctrl-C.

    kept: what is kept, and where.
    """
    try:
        yield
    except (ExperimentError, OSError) as error:
        raise SystemExit(f"coarsegrad {command}: {error}") from error
    except KeyboardInterrupt:
        print(f"\nStopped. {kept}; the same command goes on from there.")
        raise SystemExit(130) from None
