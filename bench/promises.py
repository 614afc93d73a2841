"""What is promised of the times, and whether the results keep it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .activations import IMPLEMENTATIONS
from .sweep import DTYPES, size_label

# The name of a table -> the rows of its CSV.
Results = Mapping[str, list[Mapping[str, str]]]


@dataclass(frozen=True)
class Promise:
    """That a time is at most `most` times another; time(results) -> how many times it is, None if not measured.

    tried: what was tried where it is not kept, or why it cannot be.
    """

    claim: str
    most: float
    time: Callable[[Results], float | None]
    tried: str = ""

    def verdict(self, results: Results) -> str:
        time = self.time(results)
        if time is None:
            return "not measured"
        if time <= self.most:
            return "met"
        excess = f"{time / self.most - 1:.0%}"
        return f"missed by {'less than 1%' if excess == '0%' else excess}"


def _one(rows: list[Mapping[str, str]], **case: object) -> Mapping[str, str] | None:
    return next((row for row in rows if all(row[key] == str(value) for key, value in case.items())), None)


def _over_copy(dtype: str, size: int, kernel: str, most: float, tried: str = "") -> Promise:
    def time(results: Results) -> float | None:
        row = _one(results["kernels"], dtype=dtype, size=size, kernel=kernel)
        return float(row["time_over_copy"]) if row else None

    return Promise(f"{dtype}, {size_label(size)}: {kernel}, over copying as many bytes", most, time, tried)


def _over(
    dtype: str, size: int, ours: str, theirs: str, most: float, tried: str = "", default_malloc: bool = False
) -> Promise:
    def time(results: Results) -> float | None:
        case = {"dtype": dtype, "size": size, "pass": "forward+backward"}
        rows = [row for row in results["peers"] if (row["allocator"] == "default") == default_malloc]
        both = [_one(rows, implementation=name, **case) for name in (ours, theirs)]
        return float(both[0]["seconds_median"]) / float(both[1]["seconds_median"]) if all(both) else None

    labels = [IMPLEMENTATIONS[name].label for name in (ours, theirs)]
    malloc = ", default malloc" if default_malloc else ""
    claim = f"{dtype}, {size_label(size)}{malloc}: {labels[0]}, over {labels[1]}"
    return Promise(claim, most, time, tried)


_EXPONENTIAL = (
    "`log_tailed_relu` and `reverse_exponential` in bfloat16: arithmetic is the limit, by AVX2, which has half the"
    " width, more than by AVX-512. A cubic for the power of two, added to the exponent as an integer, fused"
    " multiply-adds, a reciprocal by one step of Newton for the division, the gate and the search for numbers that need"
    " more care as comparisons in 16 bits, even and odd numbers unpacked by a shift or a mask, four chains of"
    " operations side by side, were each a gain. `vcvtne2ps2bf16` and `vdpbf16ps` were thought through and not built:"
    " they flush subnormals. A quadratic would be too far from g'; a table of all numbers is slower, by gathers."
)
_LEARNED = (
    "A learned step: its sums take operations that a fixed step does not have, and two bits an element are read. Gains"
    " were: dx in the same pass, states packed from the masks of a few numbers at a time, and a weight for each two"
    " bits, looked up in a register, whose products with dy are summed in place of two sums by masks (an infinite sum"
    " is made again by masks)."
)
_SMALL = (
    "4 elements: what is left is the call of a module and of an op through torch's dispatcher, twice, as the mask and"
    " the output come from an op below autograd. Attributes are looked up once, without a dict of keywords, the op is"
    " called past Python's search of its schema, and the derivative is C++, which a backward enters below autograd."
)
_IN_CACHE = (
    "2^16 elements: a few comparisons (AVX2) or a table search (AVX-512) took half of the arithmetic's time in cache;"
    " what is left is that an exact staircase takes more instructions than a maximum, and the call (4 elements)."
)
_COPY = (
    "Beside a copy: in cache the kernels take less time than memory does, but the two do not overlap wholly, bfloat16's"
    " less as it has twice the instructions for a cache line. Gains were: what a block's loop needs stays in registers;"
    " what is the same for all of a tensor is no branch in the loop; by AVX2 memory is asked for 2 KiB ahead (half of"
    " that, twice that, and asking for it past the caches were no better); and loads that are masked, which Zen 3's own"
    " prefetching does not see (no gain in float32's forward). All loads of a block before its stores: no change."
)
_RELU = (
    "Beside `nn.ReLU` and compiled forms on one thread: memory is the limit, and `nn.ReLU`'s own loops come near it;"
    " QReLU saves the reading of one tensor of five, and writes past the caches."
)

_PAGES = (
    "In place at 2^26 elements under the default malloc: dx is a fresh tensor there too, and its page faults are most"
    " of the time; runs of the same command differ widely, with what the system takes for a page."
)

PROMISES = (
    *(
        _over_copy(dtype, size, kernel, most, tried)
        for dtype, kernel, most, tried in (
            ("float32", "forward, 2 bits", 1.03, _COPY),
            ("bfloat16", "forward, 2 bits", 1.05, _COPY),
            ("float32", "backward, clipped_relu", 1.03, _COPY),
            ("bfloat16", "backward, clipped_relu", 1.03, _COPY),
            ("bfloat16", "backward, log_tailed_relu", 1.15, _EXPONENTIAL),
            ("bfloat16", "backward, reverse_exponential", 1.15, _EXPONENTIAL),
        )
        for size in (2**24, 2**26)
    ),
    *(_over(dtype, 2**24, "qrelu_learned", "qrelu", 1.15, _LEARNED) for dtype in DTYPES),
    *(_over(dtype, 4, "qrelu", "relu", 1.3, _SMALL) for dtype in DTYPES),
    *(_over(dtype, 2**16, "qrelu", "relu", 1.0, _IN_CACHE) for dtype in DTYPES),
    *(
        _over(dtype, size, "qrelu", theirs, most, _RELU)
        for dtype, over_relu in (("float32", 1 / 1.4), ("bfloat16", 1 / 1.15))
        for size in (2**22, 2**24)
        for theirs, most in (("relu", over_relu), ("compile", 1 / 1.4), ("eager", 1 / 5))
    ),
    *(_over(dtype, 2**26, "qrelu_inplace", "relu", 1 / 1.8, _PAGES, default_malloc=True) for dtype in DTYPES),
)
