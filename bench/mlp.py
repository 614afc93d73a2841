"""`python -m bench.mlp`: the time and memory of two Linears with an activation between them, on a GPU."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coarsegrad as cg

from .sweep import Case, Part, Sweep, add_device, find_device, run_parts, timed, timer_of
from .timing import BenchError, Row, Times, at_least, quantiles
from .traffic import PAGE, SHAPES

RESULTS = PAGE.parent.parent / "bench" / "results" / "mlp.csv"

_DESCRIPTION = """
Times the forward and backward of x @ W1.T + b1 -> activation -> @ W2.T + b2 in
bfloat16, with all gradients, and measures what the forward keeps: with nn.ReLU,
eager and compiled; with ReLU in the BLAS library's epilogue (_addmm_activation);
with ReLU squared in the epilogue of a matrix product in Triton, which keeps the
ReLU and its square; with a packed QReLU between the Linears; and with
coarsegrad.nn.QReLUMLP, which keeps codes. For a GPU; on a CPU, to try it, all
runs that need none, with an eighth of every size.
"""
_EPILOG = """
Before anything is timed, outputs and gradients are compared with those of the same
functions in float32: within 10% in the 2-norm, and 20% for staircases, of which the
order of a sum moves some codes. If one is off, no times are reported. All take turns
in one process, in a new order each round; a time is the median over the rounds.
"kept" is what autograd saves besides x, weights and biases; "peak", on a GPU, the
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


class _Chain(nn.Module):
    """call(x, the Linears' weights and biases)."""

    def __init__(self, first: nn.Linear, layer: nn.Linear, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self._call = first, layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x, self.first.weight, self.first.bias, self.layer.weight, self.layer.bias)


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


BASE = "nn.ReLU, compiled"
_SQUARE = "ReLU squared in Triton's epilogue"
WAYS: dict[str, Callable[[nn.Linear, nn.Linear], nn.Module]] = {
    "nn.ReLU": _relu,
    BASE: lambda first, layer: torch.compile(_relu(first, layer)),
    "ReLU in the epilogue": lambda first, layer: _Chain(first, layer, _relu_epilogue),
    _SQUARE: lambda first, layer: _Chain(first, layer, _SquareEpilogue.apply),
    f"QReLU, {_BITS} bits, packed": _qrelu,
    f"QReLU, {_BITS} bits, packed, compiled": lambda first, layer: torch.compile(_qrelu(first, layer)),
    f"QReLUMLP, {_BITS} bits": _mlp,
    f"QReLUMLP, {_BITS} bits, clipped_relu": functools.partial(_mlp, ste="clipped_relu"),
    f"QReLUMLP, {_BITS} bits, squared": functools.partial(_mlp, squared=True),
}


def _runs_on(way: str, device: str) -> bool:
    return device == "cuda" or way != _SQUARE


# ------------------------------------------------------------------------------------------- the jobs


def _exact(way: str, first: nn.Linear, layer: nn.Linear, x: Tensor) -> Tensor:
    """The function in float32, with the staircase of h in bfloat16."""
    h = F.linear(x, first.weight, first.bias)
    if "QReLU" in way:
        ste = "clipped_relu" if "clipped_relu" in way else "relu"
        y = cg.qrelu(h.bfloat16(), _ALPHA, _BITS, ste=ste).float()
    else:
        y = h.relu()
    return F.linear(y.square() if "squared" in way else y, layer.weight, layer.bias)


def _far(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


class _Job:
    """A forward and backward of a way, after its results were compared."""

    def __init__(self, way: str, shape: tuple[int, int, int, int], device: str) -> None:
        torch.manual_seed(0)
        rows, inputs, hidden, outputs = shape
        first, layer = (nn.Linear(*size, device=device) for size in ((inputs, hidden), (hidden, outputs)))
        x, self.grad_out = (torch.randn(rows, size, device=device) for size in (inputs, outputs))
        leaves = [x.requires_grad_(), *first.parameters(), *layer.parameters()]
        wanted = _exact(way, first, layer, x)
        wanted = [wanted, *torch.autograd.grad(wanted, leaves, self.grad_out)]
        self.model = WAYS[way](first.bfloat16(), layer.bfloat16())
        self.x, self.grad_out = x.detach().bfloat16().requires_grad_(), self.grad_out.bfloat16()
        self.leaves = [self.x, *first.parameters(), *layer.parameters()]
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
    rows = []
    for way, own in times.items():
        slow, _, fast = quantiles(own.speeds_over(times[BASE]))
        kept, peak = _MEMORY[shape, way]
        rows.append({
            "shape": shape, "part_of_size": part_of_size, "way": way, **timed(own), "kept_bytes": kept,
            "peak_bytes": "" if peak is None else peak,
            "speed_over_relu": f"{quantiles(times[BASE].seconds)[1] / quantiles(own.seconds)[1]:.4g}",
            "speed_over_relu_q20": f"{slow:.4g}", "speed_over_relu_q80": f"{fast:.4g}",
        })  # fmt: skip
    return rows


_COLUMNS = "{:<24}{:<38}{:>10}  {:<18}{:>7}{:>10}{:>10}"
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
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME",
                        help=f"some of {'; '.join(WAYS)}; always with {BASE} (default: all)")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME",
                        help=f"some of {'; '.join(SHAPES)} (default: all)")  # fmt: skip
    parser.add_argument("--rounds", type=at_least(5), default=31, metavar="N",
                        help="measured rounds, at least 5 (default 31)")  # fmt: skip
    add_device(parser, RESULTS)
    args = parser.parse_args(argv)
    find_device(parser, args, RESULTS if args.device == "cuda" else None)
    wanted = dict.fromkeys([BASE, *args.only])
    names = tuple(way for way in WAYS if way in wanted and _runs_on(way, args.device))
    inputs = tuple((shape, 1 if args.device == "cuda" else 8) for shape in args.shapes)
    run_parts("bench.mlp", SWEEP, [Part(args.device, "default", inputs, names, args.rounds, 1)], args.out)


if __name__ == "__main__":
    main()
