"""Shared by tests and benchmarks: the backends of this machine, and inputs that find mistakes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _ops, reference
from ._types import AlphaGrad, Rounding
from .backends import _triton_why_not, use_backend
from .ste import get_ste, real_numbers


def backend_ids() -> list[str]:
    """The ids of this machine's backends: "reference", "native-" plus each usable instruction set, best first, and
    "triton" if its interpreter is on."""
    return _ids([] if _ops.native is None else _ops.native.isas())


def integer_backend_ids() -> list[str]:
    """The same for layers on codes, whose kernels have more instruction sets."""
    return _ids([] if _ops.native is None else _ops.native.integer_isas())


def _ids(isas: list[str]) -> list[str]:
    return ["reference", *(f"native-{isa}" for isa in isas), *(["triton"] if _triton_why_not("cpu") is None else [])]


@contextlib.contextmanager
def serving(backend_id: str) -> Iterator[None]:
    """Have the backend with this id, one of `backend_ids()` or `integer_backend_ids()`, serve inside the block."""
    name, _, isa = backend_id.partition("-")
    with use_backend(name), contextlib.ExitStack() as stack:
        if isa and isa not in {*_ops.native.isas(), *_ops.native.integer_isas()}:
            raise ValueError(f"no backend {backend_id!r} on this machine")
        if isa and isa in _ops.native.isas():
            stack.callback(_ops.native.set_isa, _ops.native.isa())
            _ops.native.set_isa(isa)
        if isa and isa in _ops.native.integer_isas():
            stack.callback(_ops.native.set_integer_isa, _ops.native.integer_isa())
            _ops.native.set_integer_isa(isa)
        yield


@real_numbers()
def hard_inputs(alpha: float, bits: int, rounding: str, dtype: torch.dtype) -> Tensor:
    """1-d x of dtype: every level and threshold, and half a stair outside of the range, with both neighbours in dtype,
    both signs, and all special values.

    A threshold between two numbers of dtype is represented by those two.
    """
    step = torch.tensor([alpha], dtype=torch.float64)
    edges = [reference.levels(step, bits, dtype)[0], reference.thresholds(step, bits, dtype, rounding)[0]]
    on = torch.cat([*edges, step / 2, edges[0][-1:] + step / 2]).to(dtype)
    neighbours = [torch.nextafter(on, torch.full_like(on, end)) for end in (-math.inf, math.inf)]
    finite = torch.finfo(dtype)
    tiny = [finite.smallest_normal, finite.smallest_normal / 2, finite.smallest_normal * finite.eps]
    special = torch.tensor([0.0, finite.max, math.inf, math.nan, *tiny], dtype=dtype)
    x = torch.cat([on, *neighbours, special])
    return torch.cat([x, -x])


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """The distance of a and b in ulps of their dtype, int64. Two NaNs are 0 apart, a NaN and a number 2**62."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]

    def rank(t: Tensor) -> Tensor:
        bits = t.contiguous().view(integer).long()
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    apart = torch.where(a.isnan() & b.isnan(), 0, (rank(a) - rank(b)).abs())
    return torch.where(a.isnan() ^ b.isnan(), 2**62, apart)


@real_numbers()
def triton_ulps_apart(ste: str, bits: int = 4, dtype: torch.dtype = torch.float32) -> int:
    """The largest distance in ulps between g' in Triton and in plain torch, around every level, under "ceil"; if g'
    depends on the rounding, under any.

    ste: the name of an STE with a Triton form. dtype: float32 or float64. Needs TRITON_INTERPRET=1 in the environment
    of the process.
    """
    row, most = get_ste(ste), 0
    if row.triton is None:
        raise ValueError(f"ste {ste!r} has no Triton form")
    for rounding in Rounding if row.by_rounding else (Rounding.ceil,):
        x = hard_inputs(0.5, bits, rounding.name, dtype)
        x = x[x.isfinite() & (x.abs() < 2.0**40)]
        # "chain" passes x and alpha, from which both compute what the STE needs.
        settings = (bits, ste, rounding, AlphaGrad.chain, 1.0, None, True, True)
        arguments = (torch.ones_like(x), torch.tensor([0.5], dtype=dtype), x, None, None, *settings)
        with use_backend("triton"):
            by_triton, _ = _ops.ops.qrelu_backward_custom.default(*arguments)
        by_torch, _ = reference.qrelu_backward(*arguments)
        most = max(most, int(ulps_apart(by_triton, by_torch).max()))
    return most
