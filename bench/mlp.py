"""`python -m bench.mlp`: the time and memory of two Linears with an activation between them, and of gated MLPs."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coarsegrad as cg

from .sweep import Case, Part, Sweep, add_device, find_device, run_parts, timed, timer_of
from .timing import BenchError, Row, Times, at_least, quantiles
from .traffic import CHAINS, GATED, PAGE, SHAPES

RESULTS = PAGE.parent.parent / "bench" / "results" / "mlp.csv"

_DESCRIPTION = """
Times the forward and backward of x @ W1.T + b1 -> activation -> @ W2.T + b2 in
bfloat16, with all gradients, and measures what the forward keeps: with nn.ReLU,
eager and compiled; with ReLU in the BLAS library's epilogue (_addmm_activation);
with ReLU squared in the epilogue of a matrix product in Triton, which keeps the
ReLU and its square; with a packed QReLU between the Linears; and with
coarsegrad.nn.QReLUMLP, which keeps codes. Also gated MLPs, down(relu(gate(x)) *
relu(up(x))): with nn.ReLU, with packed QReLUs, and coarsegrad.nn.QReLUGatedMLP.
For a GPU; on a CPU, to try it, all runs that need none, with an eighth of every
size.
"""
_EPILOG = """
Before anything is timed, outputs and gradients are compared with those of the same
functions in float32: within 10% in the 2-norm, and 20% for staircases, of which the
order of a sum moves some codes. If one is off, no times are reported. All take turns
in one process, in a new order each round; a time is the median over the rounds.
"speed" is relative to nn.ReLU, compiled, or gated nn.ReLU, compiled, of the same
shape. "kept" is what autograd saves besides x, weights and biases; "peak", on a GPU, the
most that is allocated in a forward and backward above what was before.
"""

_ALPHA, _BITS = 0.5, 4


class _ReluEpilogue(torch.autograd.Function):
    """The BLAS library adds the bias and takes the maximum with 0 before h is stored."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        y = torch.ops.aten._addmm_activation.default(bias, x, weight.t())
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, y = ctx.saved_tensors
        grad_h = torch.ops.aten.threshold_backward.default(grad_y, y, 0)
        return grad_h @ weight, grad_h.t() @ x, grad_h.sum(0)


class _SquareEpilogue(torch.autograd.Function):
    """ReLU squared at the end of the first product, its derivative at the end of the one that makes its gradient."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2):
        from . import mlp_square

        y, z = mlp_square.forward(x, weight1, bias1)
        ctx.save_for_backward(x, weight1, weight2, y, z)
        return F.linear(z, weight2, bias2)

    @staticmethod
    def backward(ctx, grad_out):
        from . import mlp_square

        x, weight1, weight2, y, z = ctx.saved_tensors
        grad_h = mlp_square.backward(grad_out, weight2, y)
        return grad_h @ weight1, grad_h.t() @ x, grad_h.sum(0), grad_out.t() @ z, grad_out.sum(0)


class _Called(nn.Module):
    """call(x, the parameters of the Linears)."""

    def __init__(self, linears: tuple[nn.Linear, ...], call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linears, self._call = nn.ModuleList(linears), call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, *self.linears.parameters())


def _relu_epilogue(x, weight1, bias1, weight2, bias2):
    return F.linear(_ReluEpilogue.apply(x, weight1, bias1), weight2, bias2)


def _qrelu(first: nn.Linear, layer: nn.Linear) -> nn.Module:
    model = nn.Sequential(first, cg.QReLU(_BITS, ste="relu", alpha=_ALPHA), layer)
    cg.pack_activations_(model)
    return model


def _mlp(first: nn.Linear, layer: nn.Linear, ste: str = "relu", squared: bool = False) -> nn.Module:
    return cg.nn.QReLUMLP(first, cg.QReLU(_BITS, ste=ste, alpha=_ALPHA, squared=squared), layer)


def _relu(first: nn.Linear, layer: nn.Linear) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), layer)


def _gated(gate: nn.Linear, up: nn.Linear, down: nn.Linear, ste: str = "relu") -> nn.Module:
    activations = (cg.QReLU(_BITS, ste=ste, alpha=_ALPHA) for _ in range(2))
    return cg.nn.QReLUGatedMLP(gate, next(activations), up, next(activations), down)


def _gated_relu(x, gate_weight, gate_bias, up_weight, up_bias, weight, bias):
    gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    return F.linear(gate.relu() * up.relu(), weight, bias)


def _gated_qrelu(x, gate_weight, gate_bias, up_weight, up_bias, weight, bias):
    with cg.packed_activations():
        linears = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
        gate, up = (cg.qrelu(h, _ALPHA, _BITS, ste="relu") for h in linears)
        return F.linear(cg.gated_product(gate, up, "identity"), weight, bias)


BASE, GATED_BASE = "nn.ReLU, compiled", "gated nn.ReLU, compiled"
_SQUARE = "ReLU squared in Triton's epilogue"
WAYS: dict[str, Callable[..., nn.Module]] = {
    "nn.ReLU": _relu,
    BASE: lambda first, layer: torch.compile(_relu(first, layer)),
    "ReLU in the epilogue": lambda *linears: _Called(linears, _relu_epilogue),
    _SQUARE: lambda *linears: _Called(linears, _SquareEpilogue.apply),
    f"QReLU, {_BITS} bits, packed": _qrelu,
    f"QReLU, {_BITS} bits, packed, compiled": lambda first, layer: torch.compile(_qrelu(first, layer)),
    f"QReLUMLP, {_BITS} bits": _mlp,
    f"QReLUMLP, {_BITS} bits, clipped_relu": functools.partial(_mlp, ste="clipped_relu"),
    f"QReLUMLP, {_BITS} bits, squared": functools.partial(_mlp, squared=True),
}
GATED_WAYS: dict[str, Callable[..., nn.Module]] = {
    "gated nn.ReLU": lambda *linears: _Called(linears, _gated_relu),
    GATED_BASE: lambda *linears: torch.compile(_Called(linears, _gated_relu)),
    f"gated QReLU, {_BITS} bits, packed": lambda *linears: _Called(linears, _gated_qrelu),
    f"QReLUGatedMLP, {_BITS} bits": _gated,
    f"QReLUGatedMLP, {_BITS} bits, clipped_relu": functools.partial(_gated, ste="clipped_relu"),
}


def _runs_on(way: str, device: str) -> bool:
    return device == "cuda" or way != _SQUARE


# ------------------------------------------------------------------------------------------- the jobs


def _exact(way: str, linears: list[nn.Linear], x: Tensor) -> Tensor:
    """The function in float32, with the staircase of h in bfloat16."""

    def activation(h: Tensor) -> Tensor:
        if "QReLU" not in way:
            return h.relu()
        ste = "clipped_relu" if "clipped_relu" in way else "relu"
        return cg.qrelu(h.bfloat16(), _ALPHA, _BITS, ste=ste).float()

    *firsts, layer = linears
    y = math.prod(activation(first(x)) for first in firsts)
    return layer(y.square() if "squared" in way else y)


def _far(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


class _Job:
    """A forward and backward of a way, after its results were compared."""

    def __init__(self, way: str, shape: tuple[int, int, int, int], device: str) -> None:
        torch.manual_seed(0)
        rows, inputs, hidden, outputs = shape
        firsts = 2 if way in GATED_WAYS else 1
        linears = [nn.Linear(*size, device=device) for size in (*firsts * [(inputs, hidden)], (hidden, outputs))]
        x, self.grad_out = (torch.randn(rows, size, device=device) for size in (inputs, outputs))
        leaves = [x.requires_grad_(), *nn.ModuleList(linears).parameters()]
        wanted = _exact(way, linears, x)
        wanted = [wanted, *torch.autograd.grad(wanted, leaves, self.grad_out)]
        self.model = {**WAYS, **GATED_WAYS}[way](*(linear.bfloat16() for linear in linears))
        self.x, self.grad_out = x.detach().bfloat16().requires_grad_(), self.grad_out.bfloat16()
        self.leaves = [self.x, *nn.ModuleList(linears).parameters()]
        got = [self.model(self.x)]
        got += torch.autograd.grad(got[0], self.leaves, self.grad_out)
        limit = 0.2 if "QReLU" in way else 0.1
        if not all(_far(mine, right) <= limit for mine, right in zip(got, wanted)):
            off = ", ".join(f"{_far(mine, right):.3f}" for mine, right in zip(got, wanted))
            raise BenchError(f"{way} differs from float32 by {off} of the 2-norms; no times are reported")

    def __call__(self) -> object:
        return torch.autograd.grad(self.model(self.x), self.leaves, self.grad_out)

    def kept(self) -> int:
        """Bytes that the forward saves besides x and the parameters."""
        own = {t.untyped_storage().data_ptr() for t in self.leaves}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own and t.numel() > 1:
                found[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = self.model(self.x)
        del out
        return sum(found.values())

    def peak(self) -> int | None:
        if not self.x.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


_MEMORY: dict[tuple[str, str], tuple[int, int | None]] = {}


def _cases(part: Part, shape: str, part_of_size: int) -> Iterator[Case]:
    sizes = tuple(size // part_of_size for size in SHAPES[shape])
    jobs = {way: _Job(way, sizes, part.device) for way in part.names}
    for way, job in jobs.items():
        _MEMORY[shape, way] = job.kept(), job.peak()
    yield Case("", dict(jobs), grad=True)


# -------------------------------------------------------------------------------------- the report


def _rows(shape: str, part_of_size: int, _: str, times: dict[str, Times]) -> list[Row]:
    rows, base = [], times[GATED_BASE if shape in GATED else BASE]
    for way, own in times.items():
        slow, _, fast = quantiles(own.speeds_over(base))
        kept, peak = _MEMORY[shape, way]
        rows.append({
            "shape": shape, "part_of_size": part_of_size, "way": way, **timed(own), "kept_bytes": kept,
            "peak_bytes": "" if peak is None else peak,
            "speed_over_relu": f"{quantiles(base.seconds)[1] / quantiles(own.seconds)[1]:.4g}",
            "speed_over_relu_q20": f"{slow:.4g}", "speed_over_relu_q80": f"{fast:.4g}",
        })  # fmt: skip
    return rows


_COLUMNS = "{:<33}{:<42}{:>10}  {:<18}{:>7}{:>10}{:>10}"
_HEADER = _COLUMNS.format("shape", "", "ms", "(20% to 80%)", "speed", "kept, MB", "peak, MB")


def _line(row: Row) -> str:
    low, median, high = (1e3 * float(row[f"seconds_{q}"]) for q in ("q20", "median", "q80"))
    kept, peak = (f"{float(row[key]) / 1e6:.1f}" if row[key] != "" else "" for key in ("kept_bytes", "peak_bytes"))
    return _COLUMNS.format(row["shape"], row["way"], f"{median:.3f}", f"({low:.3f} to {high:.3f})",
                           row["speed_over_relu"], kept, peak)  # fmt: skip


SWEEP = Sweep(_cases, _rows, _HEADER, _line, timer_of, columns=("shape", "part_of_size", "way"), few=1)

# ------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mlp",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    every = [*WAYS, *GATED_WAYS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME",
                        help=f"some of {'; '.join(every)}; always with what others are relative to")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME",
                        help=f"some of {'; '.join(SHAPES)} (default: all)")  # fmt: skip
    parser.add_argument("--rounds", type=at_least(5), default=31, metavar="N",
                        help="measured rounds, at least 5 (default 31)")  # fmt: skip
    add_device(parser, RESULTS)
    args = parser.parse_args(argv)
    find_device(parser, args, RESULTS if args.device == "cuda" else None)
    parts, wanted = [], set(args.only)
    for shapes, ways, base in ((CHAINS, WAYS, BASE), (GATED, GATED_WAYS, GATED_BASE)):
        names = tuple(way for way in ways if way in (base, *args.only) and _runs_on(way, args.device))
        inputs = tuple((shape, 1 if args.device == "cuda" else 8) for shape in shapes if shape in args.shapes)
        if inputs and wanted & ways.keys():
            parts.append(Part(args.device, "default", inputs, names, args.rounds, 1))
    if not parts:
        parser.error("argument --only: nothing of it is measured with these --shapes")
    run_parts("bench.mlp", SWEEP, parts, args.out)


if __name__ == "__main__":
    main()
