"""What the tests and the benchmarks share: the backends of this machine, and inputs that find mistakes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _ops, reference
from .backends import use_backend


def backend_ids() -> list[str]:
    """The ids: "reference", and "native-" with each instruction set that this machine can use, best first."""
    native = [] if _ops.native is None else [f"native-{isa}" for isa in _ops.native.isas()]
    return ["reference", *native]


@contextlib.contextmanager
def serving(backend_id: str) -> Iterator[None]:
    """Lets the backend of that id, one of `backend_ids()`, serve for the duration."""
    name, _, isa = backend_id.partition("-")
    before = _ops.native.isa() if isa else None
    with use_backend(name):
        if isa:
            _ops.native.set_isa(isa)
        try:
            yield
        finally:
            if isa:
                _ops.native.set_isa(before)


def hard_inputs(alpha: float, bits: int, rounding: str, dtype: torch.dtype) -> Tensor:
    """1-d x of dtype: every level and threshold with its two neighbours in dtype, both signs, and all special values.

    A threshold between two numbers of dtype is there as those two.
    """
    step = torch.tensor([alpha], dtype=torch.float64)
    edges = [reference.levels(step, bits, dtype)[0], reference.thresholds(step, bits, dtype, rounding)[0]]
    on = torch.cat(edges).to(dtype)
    beside = [torch.nextafter(on, torch.full_like(on, end)) for end in (-math.inf, math.inf)]
    finite = torch.finfo(dtype)
    tiny = [finite.smallest_normal, finite.smallest_normal / 2, finite.smallest_normal * finite.eps]
    special = torch.tensor([0.0, finite.max, math.inf, math.nan, *tiny], dtype=dtype)
    x = torch.cat([on, *beside, special])
    return torch.cat([x, -x])


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their dtype a and b are apart, int64; two NaNs are 0 apart, a NaN and a number 2**62."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]

    def rank(t: Tensor) -> Tensor:
        bits = t.contiguous().view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    apart = torch.where(a.isnan() & b.isnan(), 0, (rank(a) - rank(b)).abs())
    return torch.where(a.isnan() ^ b.isnan(), 2**62, apart)
