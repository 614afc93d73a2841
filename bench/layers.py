"""`python -m bench.layers`: the time of each layer on codes, beside torch's in float32."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coarsegrad import _ops
from coarsegrad.integer.reference import affine_codes
from coarsegrad.integer.weights import pack_weights

from . import against
from .sweep import Case, Part, Sweep, add_out, common_options, results_file, size_label, timed
from .timing import BenchError, Row, Times, at_least, instruction_sets, quantiles

RESULTS = Path(__file__).parent / "results" / "layers.csv"

_DESCRIPTION = """
Times single layers on codes, as a network converted by coarsegrad.convert runs
them, with weights of 8, 4, 2 and 1 bits and codes of 4 bits, and with 8 bits of
both; each is compared with torch's layer of the same shape in float32.
"""
_EPILOG = """
A layer reads codes and writes codes of as many bits, by a scale and an offset for
each channel; torch's reads and writes floats and adds a bias. Images are in
channels_last. w8a4 has weights of 8 bits and codes of 4.

Before a layer is timed, its codes are compared with those of exact sums in
float64, and torch's output with these sums within 1e-5 of the largest. If one is
wrong, no times are reported. float32 and all kinds of codes take turns in one
process, in a new order each round. A time is the median over the rounds, with the
20% and 80% quantiles, of calls one after the other: what a layer reads is in cache.

"G/s" are billions of products of a code and a weight in a second. "speed" is the
time in float32 divided by the layer's: the ratio of medians, with quantiles round
by round.

--against CHECKOUT measures two builds instead, in turns, as that of bench.kernels
does: "ratio" is this build's time over the other's, "itself" the same ratio to
this build in yet another process. Nothing is written without --out.
"""

# -------------------------------------------------------------------------------------- the layers


@dataclass(frozen=True)
class Layer:
    """A Linear; or a convolution over images of `side` x `side`, padded to stay as large if its stride is 1.

    inputs, outputs: its channels. batches: that are timed.
    """

    inputs: int
    outputs: int
    side: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    batches: tuple[int, ...] = (1,)

    @property
    def shape(self) -> str:
        return f"{self.inputs} -> {self.outputs}" + (f" at {self.side} x {self.side}" if self.side else "")

    def products(self, batch: int) -> int:
        """Of a code and a weight; those with the padding are among them."""
        pixels = ((self.side - 1) // self.stride + 1) ** 2 if self.side else 1
        return batch * pixels * self.outputs * (self.inputs // self.groups) * self.kernel**2

    def in_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.side:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.kernel // 2, groups=self.groups)

    def on_codes(self, codes: Tensor, *arguments: object) -> Tensor:
        if not self.side:
            return _ops.ops.integer_linear(codes, *arguments)
        window = ([size, size] for size in (self.kernel, self.stride, self.kernel // 2, 1))
        return _ops.ops.integer_conv2d(codes, *arguments, *window, self.groups)


LAYERS = {
    "linear": Layer(1024, 1024, batches=(1, 16, 256)),
    "conv 1 x 1": Layer(256, 64, 14),
    "conv 3 x 3": Layer(64, 64, 28, kernel=3),
    "strided conv 3 x 3": Layer(64, 128, 28, kernel=3, stride=2),
    "depthwise 3 x 3": Layer(128, 128, 28, kernel=3, groups=128),
}
BASE = "float32"
# Name -> bits of the weights, and of the codes that are read and written.
NUMBERS = {f"w{weights}a{codes}": (weights, codes) for weights, codes in ((8, 8), (8, 4), (4, 4), (2, 4), (1, 4))}
_WEIGHTS = {8: range(-127, 128), 4: range(-7, 8), 2: range(-2, 2), 1: (-1, 1)}

# ----------------------------------------------------------------------------------------- the jobs


def _images(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _inputs(layer: Layer, batch: int, weight_bits: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, integer weights, their sums, which float64 has exactly)."""
    generator, shape = torch.Generator().manual_seed(0), [layer.side] * 2 if layer.side else []
    window = [layer.kernel] * len(shape)
    codes = torch.randint(2**bits, [batch, layer.inputs, *shape], dtype=torch.uint8, generator=generator)
    values = torch.tensor(_WEIGHTS[weight_bits])
    size = [layer.outputs, layer.inputs // layer.groups, *window]
    weight = values[torch.randint(len(values), size, generator=generator)]
    return _images(codes), weight, layer.in_floats(codes.double(), weight.double())


def _wrong(name: str, layer: Layer, batch: int) -> BenchError:
    return BenchError(
        f"{name} of a layer {layer.shape}, batch {batch}, differs from the exact sums; no times are reported"
    )


def _on_codes(name: str, layer: Layer, batch: int) -> Callable[[], Tensor]:
    """The layer after its output was checked."""
    weight_bits, bits = NUMBERS[name]
    codes, weight, sums = _inputs(layer, batch, weight_bits, bits)
    levels = 2**bits - 1
    # Sums within two deviations of their mean have codes between the ends; no two channels have the same scale.
    scale = torch.linspace(0.75, 1.25, layer.outputs) * (levels / 4 / sums.std().item())
    offset = levels / 2 - scale * sums.mean().item()
    packed = pack_weights(weight.movedim(1, -1).flatten(1), weight_bits)

    def job() -> Tensor:
        return layer.on_codes(codes, packed, bits, weight_bits, scale, offset, None, levels)

    if not torch.equal(job(), affine_codes(sums.movedim(1, -1), scale, offset, levels).movedim(-1, 1)):
        raise _wrong(name, layer, batch)
    return job


def _in_floats(layer: Layer, batch: int) -> Callable[[], Tensor]:
    """torch's layer after its output was checked."""
    codes, weight, sums = _inputs(layer, batch, 8, 4)
    x, filters, bias = codes.float(), _images(weight.float()), torch.zeros(layer.outputs)

    def job() -> Tensor:
        return layer.in_floats(x, filters, bias)

    if not ((job() - sums).abs() <= 1e-5 * sums.abs().max()).all():
        raise _wrong(BASE, layer, batch)
    return job


def _cases(part: Part, layer: str, batch: int) -> Iterator[Case]:
    jobs = {BASE: _in_floats(LAYERS[layer], batch)}
    yield Case("", jobs | {name: _on_codes(name, LAYERS[layer], batch) for name in part.names})


# -------------------------------------------------------------------------------------- the report


def _rows(layer: str, batch: int, _: str, times: dict[str, Times]) -> list[Row]:
    """The CSV: a row for each kind of numbers."""
    base, rows = quantiles(times[BASE].seconds)[1], []
    for name, own in times.items():
        slow, _, fast = quantiles(own.speeds_over(times[BASE]))
        median, products = quantiles(own.seconds)[1], LAYERS[layer].products(batch)
        rows.append({
            "layer": layer, "shape": LAYERS[layer].shape, "batch": batch, "numbers": name, "products": products,
            **timed(own), "billions_per_second": f"{products / median / 1e9:.4g}",
            f"speed_over_{BASE}": f"{base / median:.4g}",
            f"speed_over_{BASE}_q20": f"{slow:.4g}", f"speed_over_{BASE}_q80": f"{fast:.4g}",
            "instruction_sets": instruction_sets(),
        })  # fmt: skip
    return rows


_COLUMNS = "{:<20}{:<20}{:>6}  {:<8}{:>9}  {:<20}{:>7}{:>7}  {}"
_HEADER = _COLUMNS.format("layer", "", "batch", "numbers", "us", "(20% to 80%)", "G/s", "speed", "(20% to 80%)")


def _line(row: Row) -> str:
    low, median, high = (1e6 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
    slow, speed, fast = (float(row[f"speed_over_{BASE}{q}"]) for q in ("_q20", "", "_q80"))
    return _COLUMNS.format(
        row["layer"], row["shape"], size_label(row["batch"]), row["numbers"],
        f"{median:.1f}", f"({low:.1f} to {high:.1f})", f"{float(row['billions_per_second']):.1f}",
        f"{speed:.2f}", f"({slow:.2f} to {fast:.2f})",
    )  # fmt: skip


SWEEP = Sweep(_cases, _rows, _HEADER, _line, columns=("layer", "batch", "numbers"), few=1)

# ------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> None:
    table = (
        f"  {name.ljust(20)}{layer.shape}, batch {', '.join(map(str, layer.batches))}\n"
        for name, layer in LAYERS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m bench.layers", description=_DESCRIPTION, epilog=f"Layers:\n{''.join(table)}{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    common_options(parser, LAYERS, BASE)
    parser.add_argument(
        "--rounds", type=at_least(5), default=101, metavar="N", help="measured rounds, at least 5 (default 101)"
    )
    add_out(parser, RESULTS)
    against.add_option(parser)
    args = parser.parse_args(argv)
    against.check_option(parser, args)
    if not args.against:
        args.out = results_file(parser, args, RESULTS)
    inputs = tuple((name, batch) for name in LAYERS if name in args.only for batch in LAYERS[name].batches)
    against.run("bench.layers", SWEEP, Part("cpu", "keep", inputs, tuple(NUMBERS), args.rounds, args.threads), args)


if __name__ == "__main__":
    main()
