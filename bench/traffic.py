"""`python -m bench.traffic`: the bytes that a chain of two Linears moves on a GPU, with codes and without."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from coarsegrad._text import format_table
from coarsegrad._types import CODE_WIDTH

from .pages import DOCS, fill, markdown

PAGE, BITS = DOCS / "memory.md", 4

_DESCRIPTION = """
Counts the bytes that the forward and the backward of x @ W1.T + b1 -> activation ->
@ W2.T + b2 move on a GPU, and of gated MLPs with the product of two activations in
the middle: by the matrix products of coarsegrad.qrelu_mlp and qrelu_gated_mlp, which
write and read codes, and by the layers one after the other, with nn.ReLU in 16 bits
and with QReLUs whose y the next layer keeps as codes. Nothing is run or timed.
"""
_EPILOG = """
"memory": every tensor that a kernel reads or writes, once: what no cache can save.
"loaded": what the programs of its grid load and store, tile by tile: an operand of a
matrix product once for each tile across it. Caches serve most of that; it bounds
the traffic between them and the multiprocessors. Both of 16-bit numbers, tiles of
triton/mlp.py's TILES[0] for all matrix products, of the BLAS library's too. Two
activations and their product count as one kernel. Alphas, biases and what is NaN in
a row are below a thousandth and left out. With the
defaults the sums of each chain are written to docs/memory.md.
"""

# Rows, inputs, hidden, outputs.
CHAINS = {
    "OPT-1.3B, 4,096 tokens": (4096, 2048, 8192, 2048),
    "OPT-6.7B, 4,096 tokens": (4096, 4096, 16384, 4096),
}
GATED = {"Mistral-7B, gated, 4,096 tokens": (4096, 4096, 14336, 4096)}
SHAPES = {**CHAINS, **GATED}
_HALF = 16  # bits of a number


@dataclass(frozen=True)
class Matrix:
    """bits: of an element."""

    height: int
    width: int
    bits: float

    @property
    def bytes(self) -> float:
        return self.height * self.width * self.bits / 8


@dataclass(frozen=True)
class Kernel:
    """A matrix product, if it has operands, with what its tiles read and write besides; else one over elements."""

    name: str
    operands: tuple[Matrix, ...]
    elements: tuple[Matrix, ...]

    def memory(self) -> float:
        return sum(each.bytes for each in (*self.operands, *self.elements))

    def loaded(self, rows: int, columns: int) -> float:
        """With tiles of the output of so many rows and columns: of the first operand a row of tiles reads its rows, of
        the second a column of tiles its columns."""
        if not self.operands:
            return self.memory()
        first, second = self.operands
        down, right = math.ceil(first.height / rows), math.ceil(second.height / columns)
        return right * first.bytes + down * second.bytes + sum(each.bytes for each in self.elements)


def chain(
    shape: tuple[int, int, int, int], bits: int | None, fused: bool, gate: int = 1, factors: int = 1
) -> list[Kernel]:
    """The kernels of a forward and backward. bits: None for nn.ReLU; gate: bits of a mask. factors: how many
    activations y is the product of, each of a h of its own, in one kernel if they are not fused; nn.ReLU keeps y, or
    for a product both h and y."""
    rows, inputs, hidden, outputs = shape
    x, grad_x = (Matrix(rows, inputs, _HALF),) * 2
    weight1, weight2 = Matrix(hidden, inputs, _HALF), Matrix(outputs, hidden, _HALF)
    h = y = grad_y = grad_h = Matrix(rows, hidden, _HALF)
    out = grad_out = Matrix(rows, outputs, _HALF)
    code_bits, mask_bits = (CODE_WIDTH[bits], gate) if bits else (0, 0)
    codes, masks = (Matrix(rows, hidden, factors * width) for width in (code_bits, mask_bits))
    gates = (masks,) if factors == 1 else (masks, codes)
    last = factors * [
        Kernel("dx = dh @ W1", (grad_h, _turned(weight1)), (grad_x,)),
        Kernel("dW1 = dh.T @ x", (_turned(grad_h), _turned(x)), (weight1,)),
    ]
    if factors > 1:
        last.append(Kernel("sum of dx", (), (grad_x, grad_x, grad_x)))
    if fused:
        each = Matrix(rows, hidden, code_bits), Matrix(rows, hidden, mask_bits)
        return [
            *factors * [Kernel("x @ W1.T to codes", (x, weight1), each)],
            Kernel("codes @ W2.T", (codes, weight2), (out,)),
            Kernel("dh = gated dout @ W2", (grad_out, _turned(weight2)), (*gates, *factors * (grad_h,))),
            Kernel("dW2 = dout.T @ codes", (_turned(grad_out), _turned(codes)), (weight2,)),
            *last,
        ]
    kept = (codes, masks) if bits else ()
    rebuilt = [Kernel("y of codes", (), (codes, y))] if bits else []
    if not bits:
        gates = (y,) if factors == 1 else factors * (h,)
    return [
        *factors * [Kernel("h = x @ W1.T", (x, weight1), (h,))],
        Kernel("y of h", (), (*factors * (h,), y, *kept)),
        Kernel("y @ W2.T", (y, weight2), (out,)),
        Kernel("dy = dout @ W2", (grad_out, _turned(weight2)), (grad_y,)),
        Kernel("dh of dy", (), (grad_y, *gates, *factors * (grad_h,))),
        *rebuilt,
        Kernel("dW2 = dout.T @ y", (_turned(grad_out), _turned(y)), (weight2,)),
        *last,
    ]


def _turned(matrix: Matrix) -> Matrix:
    return Matrix(matrix.width, matrix.height, matrix.bits)


def rows(names: Iterable[str], bits: int) -> list[dict[str, object]]:
    """Of each shape and way a row for each kernel and one for all, relative to nn.ReLU's."""
    from coarsegrad.triton.mlp import TILES

    tile = TILES[0][:2]
    found = []
    for name in names:
        made = functools.partial(chain, SHAPES[name], factors=2 if name in GATED else 1)
        ways = {
            "nn.ReLU": made(None, False),
            f"QReLU, {bits} bits": made(bits, False),
            f"one op, {bits} bits": made(bits, True),
        }
        whole = [sum(count(k) for k in ways["nn.ReLU"]) for count in (Kernel.memory, lambda k: k.loaded(*tile))]
        for way, kernels in ways.items():
            counts = [(k.name, k.memory(), k.loaded(*tile)) for k in kernels]
            counts.append(("all", *(sum(column) for column in list(zip(*counts))[1:])))
            found += [
                {
                    "shape": name, "way": way, "kernel": kernel,
                    "memory_bytes": round(memory), "loaded_bytes": round(loaded),
                    "memory_over_relu": f"{memory / whole[0]:.3f}", "loaded_over_relu": f"{loaded / whole[1]:.3f}",
                }
                for kernel, memory, loaded in counts
            ]  # fmt: skip
    return found


def page_table(bits: int) -> str:
    """All kernels together, for docs/memory.md."""
    found = {(r["shape"], r["way"]): r for r in rows(SHAPES, bits) if r["kernel"] == "all"}
    ways = list(dict.fromkeys(way for _, way in found))
    lines = []
    for shape in SHAPES:
        whole, *others = (found[shape, way] for way in ways)
        memory = [f"{float(r['memory_over_relu']):.2f}" for r in others]
        lines.append(
            (shape, f"{whole['memory_bytes'] / 1e9:.2f} GB", *memory, f"{float(others[-1]['loaded_over_relu']):.2f}")
        )
    return markdown(("", ways[0], *ways[1:], f"{ways[-1]}, loaded"), lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME",
                        help=f"some of {'; '.join(SHAPES)} (default: all)")  # fmt: skip
    parser.add_argument("--bits", type=int, default=BITS, choices=range(1, 9), metavar="N",
                        help=f"of the codes, 1 to 8 (default {BITS})")  # fmt: skip
    args = parser.parse_args(argv)
    header = ("shape", "way", "kernel", "memory, MB", "loaded, MB", "of nn.ReLU's", "loaded")
    print(format_table(header, [
        (r["shape"], r["way"], r["kernel"], f"{r['memory_bytes'] / 1e6:.1f}", f"{r['loaded_bytes'] / 1e6:.0f}",
         r["memory_over_relu"], r["loaded_over_relu"])
        for r in rows(args.shapes, args.bits)
    ]))  # fmt: skip
    if args.shapes == list(SHAPES) and args.bits == BITS:
        fill(PAGE, {"traffic": page_table(BITS)})


if __name__ == "__main__":
    main()
