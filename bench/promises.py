"""Upper bounds that the measured times must meet, and verdicts on the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .activations import IMPLEMENTATIONS
from .engines import ENGINES, ours
from .sweep import DTYPES, size_label
from .workloads import WORKLOADS

# The name of a table -> the rows of its CSV.
Results = Mapping[str, list[Mapping[str, str]]]


@dataclass(frozen=True)
class Work:
    """What takes the time of a promise: CPU kernels, by their names in bench.kernels, on `size` elements.
    row(results): where that time is measured."""

    dtype: str
    size: int
    kernels: tuple[str, ...]
    row: Callable[[Results], Mapping[str, str] | None]


@dataclass(frozen=True)
class Promise:
    """That a time is at most `most` times another. time(results) -> the measured ratio, None if not measured.

    tried: what was tried if the promise is missed, or why it cannot be kept.
    needs: the instruction set that the promise is about; none if empty.
    work: what is timed; None where it is more than some kernels.
    """

    claim: str
    most: float
    time: Callable[[Results], float | None]
    tried: str = ""
    needs: str = ""
    work: Work | None = None

    def verdict(self, results: Results) -> str:
        if not self.is_about(results):
            return "not run on this machine"
        time = self.time(results)
        if time is None:
            return "not measured"
        if time <= self.most:
            return "met"
        excess = f"{time / self.most - 1:.0%}"
        return f"missed by {'less than 1%' if excess == '0%' else excess}"

    def is_about(self, results: Results) -> bool:
        """The machine of the results has what the promise needs."""
        return not self.needs or all(self.needs in row["instruction_sets"].split() for row in results["inference"][:1])


def _one(rows: list[Mapping[str, str]], **case: object) -> Mapping[str, str] | None:
    return next((row for row in rows if all(row[key] == str(value) for key, value in case.items())), None)


def _over_copy(dtype: str, size: int, kernel: str, most: float, tried: str = "") -> Promise:
    def row(results: Results) -> Mapping[str, str] | None:
        return _one(results["kernels"], dtype=dtype, size=size, kernel=kernel)

    def time(results: Results) -> float | None:
        found = row(results)
        return float(found["time_over_copy"]) if found else None

    claim = f"{dtype}, {size_label(size)}: {kernel} vs. copying as many bytes"
    return Promise(claim, most, time, tried, work=Work(dtype, size, (kernel,), row))


# The kernels of an implementation's forward and backward; a learned one's forward keeps two bits instead of one.
_KERNELS = {
    "qrelu": ("forward, 2 bits", "backward, clipped_relu"),
    "qrelu_inplace": ("forward, 2 bits", "backward, clipped_relu"),
    "qrelu_learned": ("forward, 2 bits", "backward, learned step"),
}


def _over(
    dtype: str, size: int, ours: str, theirs: str, most: float, tried: str = "", default_malloc: bool = False
) -> Promise:
    def row(results: Results, name: str = ours) -> Mapping[str, str] | None:
        rows = [row for row in results["peers"] if (row["allocator"] == "default") == default_malloc]
        return _one(rows, implementation=name, dtype=dtype, size=size, **{"pass": "forward+backward"})

    def time(results: Results) -> float | None:
        both = [row(results, name) for name in (ours, theirs)]
        return float(both[0]["seconds_median"]) / float(both[1]["seconds_median"]) if all(both) else None

    labels = [IMPLEMENTATIONS[name].label for name in (ours, theirs)]
    malloc = ", default malloc" if default_malloc else ""
    claim = f"{dtype}, {size_label(size)}{malloc}: {labels[0]} vs. {labels[1]}"
    return Promise(claim, most, time, tried, work=Work(dtype, size, _KERNELS[ours], row))


_EXPONENTIAL = (
    "`log_tailed_relu` and `reverse_exponential` in bfloat16: arithmetic is the limit, more so under AVX2, which"
    " has half the width of AVX-512. Each of these helped: a cubic for the power of two, added to the exponent as an"
    " integer; fused multiply-adds; one Newton step for the reciprocal instead of a division; the gate and the"
    " search for numbers that need more care as 16-bit comparisons; even and odd numbers unpacked by a shift or a"
    " mask; four independent chains of operations. `vcvtne2ps2bf16` and `vdpbf16ps` were considered and rejected"
    " because they flush subnormals. A quadratic deviates too far from g'; a table of all numbers is slower because"
    " of its gathers."
)
_LEARNED = (
    "A learned step: its sums take operations that a fixed step does not need, and two bits per element are read."
    " These helped: computing dx in the same pass; packing states from the masks of a few numbers at a time; one"
    " weight for each two bits, looked up in a register, whose products with dy are summed instead of two masked"
    " sums (an infinite sum is recomputed with masks)."
)
_SMALL = (
    "4 elements: what remains is the call of a module and two calls of an op through torch's dispatcher, since mask"
    " and output come from an op below autograd. Attributes are looked up once, without a dict of keywords; the op"
    " is called without Python's schema search; the derivative is in C++ and enters below autograd."
)
_IN_CACHE = (
    "2^16 elements: a few comparisons halved the arithmetic's time in cache."
    " What remains is that an exact staircase takes more instructions than a maximum, and the cost of the call (see"
    " 4 elements)."
)
_COPY = (
    "Compared with a copy: in cache the kernels take less time than memory does, but the two do not overlap"
    " completely, least of all in bfloat16, which takes twice the instructions per cache line: where memory is fast,"
    " the ratio is higher though the time is not. These helped: keeping"
    " a block's operands in registers; no branch in the loop on what is constant for the tensor; under AVX2,"
    " prefetching 2 KiB ahead (half of that, twice that and non-temporal prefetches were no better) and masked"
    " loads, which Zen 3's prefetcher does not see (no gain in float32's forward). Issuing all loads of a block"
    " before its stores made no difference."
)
_RELU = (
    "Compared with `nn.ReLU` and compiled forms on one thread: memory is the limit, and `nn.ReLU`'s own loops come"
    " close to it. QReLU saves reading one tensor of five, and its stores bypass the caches."
)
_PAGES = (
    "In place at 2^26 elements under the default malloc: dx is a new tensor here too, and its page faults dominate."
    " Runs of the same command differ widely with the page size that the system chooses."
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

# ------------------------------------------------------------------------------------------- integers


_AVX2 = (
    "W8A4 under AVX2, 128 rows: arithmetic is the limit. `vpmaddubsw` multiplies 32 codes by weights and adds pairs of"
    " products in 16 bits, where sums stay for up to eight of them; weights are ordered so that a lane has one"
    " channel's."
)


def _faster(
    workload: str, batch: int, weight_bits: int, peer: str, least: float, needs: str = "amx_int8", tried: str = ""
) -> Promise:
    """That the converted network is `least` times as fast as the peer."""
    mine = ours(weight_bits)

    def time(results: Results) -> float | None:
        case = {"workload": workload, "batch": batch}
        both = [_one(results["inference"], engine=name, **case) for name in (mine, peer)]
        return float(both[0]["seconds_median"]) / float(both[1]["seconds_median"]) if all(both) else None

    labels = ENGINES[mine].label, ENGINES[peer].label
    claim = f"{WORKLOADS[workload].label}, batch {batch}: {labels[0]} vs. {labels[1]}"
    return Promise(claim, 1 / least, time, tried, needs)


INFERENCE_PROMISES = (
    _faster("mlp", 128, 8, "float32", 3, needs="avx2", tried=_AVX2),
    *(
        _faster(workload, batch, weight_bits, peer, least)
        for workload, batch, weight_bits, over in (
            ("mlp", 1, 8, {"float32": 4, "bfloat16": 3.3, "onnxruntime": 1.1}),
            ("mlp", 128, 8, {"float32": 15, "bfloat16": 3, "onednn": 1.2, "openvino": 1.4, "onnxruntime": 1.5}),
            ("mlp", 1024, 8, {"onednn": 1.3}),
            ("mlp", 1, 4, {"float32": 7.5, "bfloat16": 6, "onnxruntime": 2, "openvino": 2}),
            ("mlp", 16, 4, {"float32": 20, "bfloat16": 5, "onnxruntime": 1.7, "openvino": 1.7}),
            ("mlp", 1, 2, {"float32": 14, "bfloat16": 11, "onnxruntime": 3.5, "nbits2": 1.4}),
            ("conv56", 1, 8, {"float32": 15, "bfloat16": 3.5, "onednn": 1.25}),
            ("lenet", 64, 8, {"float32": 13, "openvino": 1.2}),
        )
        for peer, least in over.items()
    ),
)
