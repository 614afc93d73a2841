"""What the whole package shares: the options with their names and numbers, dtypes, and the widths of packed values.

Users name an option. The ops below `qrelu` take its number, which is the value of the C++ enumerator with that name.
Numbers are passed as plain ints: an op takes microseconds longer for an IntEnum.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, TypeAlias, TypeVar, get_args

import torch

from ._text import one_of


class Ste(IntEnum):
    """The coarse gradients that every backend has compiled in."""

    identity = 0
    relu = 1
    clipped_relu = 2
    log_tailed_relu = 3
    reverse_exponential = 4
    trust = 5


class Rounding(IntEnum):
    """Where the thresholds lie."""

    ceil = 0
    nearest = 1
    hwgq = 2


class AlphaGrad(IntEnum):
    """The rule for the gradient of alpha."""

    exact = 0
    three_valued = 1
    two_valued = 2
    chain = 3


class MaskKind(IntEnum):
    """The bits of x that are saved for backward: none; x > 0; 0 < x <= L[q]; two bits, 0 / inside / above; or
    -alpha/2 <= x <= L[q] + alpha/2."""

    nothing = 0
    positive = 1
    inside = 2
    state = 3
    near = 4


# What dx depends on: nothing, the bit x > 0, the bit 0 < x <= L[q], that of MaskKind.near, the code of x, or x itself.
Needs: TypeAlias = Literal["nothing", "positive", "inside", "near", "codes", "x"]

RoundingName: TypeAlias = Literal["ceil", "nearest", "hwgq"]
AlphaGradName: TypeAlias = Literal["exact", "three_valued", "two_valued", "chain"]
# A str, as `register_ste` adds more.
SteName: TypeAlias = (
    Literal[
        "identity",
        "relu",
        "clipped_relu",
        "log_tailed_relu",
        "reverse_exponential",
        "trust",
        "reverse_exponential_step",
        "dsq",
        "stable_qat",
    ]
    | str
)
# Of the signed staircase.
SignedSteName: TypeAlias = Literal["clipped", "identity"]
SignedAlphaGradName: TypeAlias = Literal["exact", "chain"]
AlphaScale: TypeAlias = float | Literal["lsq"]
WeightBits: TypeAlias = Literal[8, 4, 2, 1]
WeightSteName: TypeAlias = Literal["identity", "clipped", "trust"]

BUILT_IN = tuple(Ste.__members__)
ROUNDINGS = tuple(Rounding.__members__)
ALPHA_GRADS = tuple(AlphaGrad.__members__)
SIGNED_STES = get_args(SignedSteName)
SIGNED_ALPHA_GRADS = get_args(SignedAlphaGradName)
WEIGHT_BITS = get_args(WeightBits)
WEIGHT_STES = get_args(WeightSteName)

_Option = TypeVar("_Option", bound=IntEnum)


def parse(argument: str, got: str | int, options: type[_Option]) -> _Option:
    """The option with this name or number; a ValueError lists the names."""
    try:
        return options[got] if isinstance(got, str) else options(got)
    except (KeyError, ValueError):
        raise ValueError(one_of(argument, got, options.__members__)) from None


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which x of `dtype` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The most weights that share a scale: then no sum of integers overflows (docs/spec.md, section 7).
MOST_WEIGHTS = 2**25

# The most bits for which Inductor fuses a qrelu of which nothing is saved: a comparison and a select for each level.
INDUCTOR_BITS = 4

# Bits of one packed code: a power of two, so that no code straddles two bytes.
CODE_WIDTH = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
MASK_WIDTH: dict[int, int] = {kind: {MaskKind.nothing: 0, MaskKind.state: 2}.get(kind, 1) for kind in MaskKind}


def top_level(bits: int) -> int:
    """p: the levels of the signed staircase are -p to p."""
    return 2 ** (bits - 1) - 1


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` packed values of `width` bits."""
    return (count * width + 7) // 8
