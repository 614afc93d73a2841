"""`python -m bench.instructions`: the machine instructions that each CPU kernel executes per element."""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from coarsegrad import reference
from coarsegrad.experiments.measure import environment
from coarsegrad.integer.weights import pack_weights

from .against import SLOWER
from .bounds import COPY, GHZ, LAYER_DTYPE, PER_CYCLE, least_seconds, rows_in, times_of
from .counters import MACHINES, ROOT, Case, Machine, NotCounted, host_cases, host_cases_signed
from .kernels import ALPHA, BITS, GROUP, KERNELS, LAYOUTS, ROW
from .kernels import RESULTS as TIMES
from .timing import BenchError, Row, write_csv

RESULTS = TIMES.with_name("instructions.csv")
DTYPES = ("float32", "bfloat16")

_DESCRIPTION = """
Counts the machine instructions that each CPU kernel of bench.kernels executes per
element, for every instruction set that can be counted here. The kernels are built
into a program of their own, which an emulator runs: Bochs for x86-64, whether this
machine has AVX-512 or not; qemu for AArch64, with a cross compiler. Nothing is
timed: a busy machine counts the same.
"""
_EPILOG = """
A count is what the functions of a kernel execute for 2^15 elements and not for
2^14, so that what is done once is left out; an instruction on a vector is one. The
stores are those into the caches. For a layer on codes an
element is one product of a code and a weight. The outputs are compared with the
reference.

"at least" is the time in which a core executes as many, --per-cycle of them in a
cycle of --ghz: a bound, as instructions wait for memory and for each other. Next
to it, if bench/results/kernels.csv has the instruction set, what was measured at
2^24 elements: a copy of as many bytes, and the kernel. `python -m bench.report`
says of each promise that is missed which of the two is its limit.

--against CHECKOUT counts the kernels of another checkout's csrc/ too, with the same
cases, and prints both; nothing is written.

In the CSV what is counted takes the place of what was; other rows stay, each with
the commit that it was counted at. An instruction set that cannot be counted is
named, with the reason. Debian's and Ubuntu's packages, and pip's:
  x86-64   cmake g++; pip install bochscpu-python==0.2.0
  AArch64  cmake g++-aarch64-linux-gnu qemu-user-static
"""

# ------------------------------------------------------------------------------------------- the cases

# Whole chunks of sums, and whole rows of every layout.
COUNTS = (2**14, 2**15)


def _layout(x: Tensor, per: str | None) -> tuple[Tensor, tuple[int, ...] | None]:
    """(alphas, shape) where each of a layout has its own alpha, or there is one."""
    if per is None:
        return host_cases.alpha_tensor([ALPHA], x.dtype), None
    channels, inner = LAYOUTS[per]
    return host_cases.alpha_tensor([ALPHA] * channels, x.dtype), (x.numel() // (channels * inner), channels, inner)


def _forward(x: Tensor, bits: int, mask: str = "inside", codes: bool = False, per: str | None = None) -> Case:
    alpha, shape = _layout(x, per)
    return host_cases.forward_case(x, alpha, bits, "ceil", mask, codes, shape=shape)


def _backward(x: Tensor, dy: Tensor, ste: str, rule: str | None = None, per: str | None = None) -> Case:
    alpha, shape = _layout(x, per)
    return host_cases.backward_case(x, dy, alpha, BITS, ste, "ceil", rule, shape=shape)


def _codes(x: Tensor) -> Tensor:
    return reference.qrelu_codes(x, _layout(x, None)[0], BITS, "ceil", None)


def _from_slopes(x: Tensor, dy: Tensor) -> Case:
    codes, slopes = _codes(x), torch.linspace(1, 0.1, 2**BITS)
    expected = {"grad_x": reference.backward_from_slopes(dy, codes, slopes, BITS)}
    inputs = {"grad_y": dy, "codes": codes, "slopes": slopes}
    return Case("backward_from_slopes", x.dtype, BITS, x.numel(), inputs, expected, expected=expected)


def _dequantize(x: Tensor) -> Case:
    return host_cases.dequantize_case(_codes(x), _layout(x, None)[0], BITS, x.shape, x.dtype, None)


def _signed(x: Tensor, bits: int) -> Case:
    return host_cases_signed.forward_case(x.view(1, -1), None, bits, False, False, group=GROUP)


def _normed(x: Tensor) -> list[Case]:
    """RMSNorm of rows, and the staircase of its output, as the one op runs them."""
    rows, weight = x.view(-1, ROW), torch.ones(ROW)
    out, *_, inverse = reference.norm_qsigned(
        rows, weight, None, 1e-6, False, False, False, None, None, None, True, False
    )
    expected = {"out": out.flatten(), "inverse": inverse.flatten()}
    norm = Case(
        "norm", x.dtype, 0, x.numel(), {"x": x, "weight": weight}, expected, channels=rows.shape[0], inner=ROW,
        scale=1e-6, expected=expected,
    )  # fmt: skip
    return [norm, _signed(out.flatten(), 4)]


def _copy(x: Tensor) -> Case:
    words = x.view(torch.float32)  # the kernel's, of any dtype
    return Case("copy", torch.float32, 0, words.numel(), {"x": words}, {"y": words}, expected={"y": words})


def _cases(x: Tensor, dy: Tensor) -> dict[str, Callable[[], Case | list[Case]]]:
    """Kernel -> what runs it, with the settings that bench.kernels times it with."""
    return {
        COPY: lambda: _copy(x),
        **{f"forward, {_plural(n, 'bit')}": functools.partial(_forward, x, n) for n in (1, 2, 3, 4, 6, 8)},
        "forward, 2 bits, per feature": lambda: _forward(x, 2, per="feature"),
        "forward to codes, 2 bits": lambda: _forward(x, 2, "nothing", codes=True),
        **{
            f"backward, {ste}": functools.partial(_backward, x, dy, ste)
            for ste in ("clipped_relu", "log_tailed_relu", "reverse_exponential")
        },
        "backward, reverse_exponential_step": lambda: _from_slopes(x, dy),
        "backward, learned step": lambda: _backward(x, dy, "clipped_relu", "three_valued"),
        **{
            f"backward, learned step, per {per}": functools.partial(
                _backward, x, dy, "clipped_relu", "three_valued", per
            )
            for per in LAYOUTS
        },
        "backward, learned step, exact": lambda: _backward(x, dy, "clipped_relu", "exact"),
        "codes to levels, 2 bits": lambda: _dequantize(x),
        **{f"signed, {bits} bits, per group": functools.partial(_signed, x, bits) for bits in (4, 8)},
        "norm, signed, one op, per group": lambda: _normed(x),
    }


def _on_codes(
    op: str, codes: Tensor, fan_in: int, channels: int, inner: int, bits: int, sums: Callable[[Tensor, Tensor], Tensor]
) -> Case:
    """A layer on codes of `bits` bits, whose weights, `fan_in` a channel, have as many."""
    top = max(1, 2 ** (bits - 1) - 1)
    weight = torch.randint(-top, top + 1, (channels, fan_in), generator=torch.Generator().manual_seed(1))
    if bits == 1:
        weight[weight == 0] = 1
    scale, offset = torch.linspace(0.1, 1, channels), torch.linspace(-1, 1, channels)
    out = (sums(codes.double(), weight.double()).float() * scale + offset).flatten()
    inputs = {"x": codes.to(torch.uint8), "weight": pack_weights(weight, bits), "alpha": scale, "bias": offset}
    return Case(
        op, torch.float32, bits, codes.numel(), inputs, {"out": out}, channels=channels, inner=inner, group=bits,
        expected={"out": out},
    )  # fmt: skip


def _codes_of(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0))


_OUTPUTS, _WIDTH = 32, 16


def _linear(rows: int, bits: int, count: int) -> Case:
    codes = _codes_of(bits, rows, count // rows)
    return _on_codes("linear", codes, codes.size(1), _OUTPUTS, codes.size(1), bits, lambda x, w: x @ w.T)


def _conv(op: str, channels: int, bits: int, count: int) -> Case:
    """Of 3 x 3, with as many channels of the output."""
    inputs = 1 if op == "depthwise" else channels

    def sums(x: Tensor, w: Tensor) -> Tensor:
        kernel = w.view(channels, 3, 3, inputs).movedim(-1, 1)
        images = F.conv2d(x.movedim(-1, 0)[None], kernel, padding=1, groups=channels // inputs)
        return images[0].movedim(0, -1)

    codes = _codes_of(bits, count // (channels * _WIDTH), _WIDTH, channels)
    return _on_codes(op, codes, 9 * inputs, channels, _WIDTH, bits, sums)


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number > 1)}"


@dataclass(frozen=True)
class Layer:
    """make: for a number of codes. products: of each of these."""

    make: Callable[[int], Case]
    products: int


# By 64 rows and more each instruction set multiplies in the way that it does most.
LAYERS = {
    f"linear, {_plural(rows, 'row')}, {_plural(bits, 'bit')}": Layer(functools.partial(_linear, rows, bits), _OUTPUTS)
    for rows in (64, 1)
    for bits in (8, 4, 2, 1)
} | {
    f"{op}, 3 x 3, {_plural(bits, 'bit')}": Layer(functools.partial(_conv, op, channels, bits), products)
    for op, channels, products in (("conv", _OUTPUTS, 9 * _OUTPUTS), ("depthwise", 64, 9))
    for bits in (8, 4)
}


@functools.cache
def cases(dtype: torch.dtype, count: int) -> dict[str, list[Case]]:
    """Kernel -> the calls that it consists of, on the first `count` of the same random numbers; of LAYER_DTYPE those on
    codes."""
    if dtype == getattr(torch, LAYER_DTYPE):
        return {name: [layer.make(count)] for name, layer in LAYERS.items()}
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(COUNTS[1], generator=generator).to(dtype)[:count] for _ in range(2))
    made = {name: make() for name, make in _cases(x, dy).items()}
    return {name: case if isinstance(case, list) else [case] for name, case in made.items()}


COUNTED = (*(name for name in (COPY, *KERNELS) if "two ops" not in name), *LAYERS)  # of the two one is torch's

# ------------------------------------------------------------------------------------------ the counts


def per_element(machine: Machine, program: Path, isa: str, kernel: str, dtype: torch.dtype) -> float:
    """Of layers on codes per product."""
    totals = []
    for count in COUNTS:
        try:
            totals.append(sum(machine.executed(program, isa, case) for case in cases(dtype, count)[kernel]))
        except AssertionError as wrong:
            raise BenchError(f"{kernel!r}: {wrong} differs from the reference ({isa}, {dtype})") from None
    per_code = (totals[1] - totals[0]) / (COUNTS[1] - COUNTS[0])
    return per_code / LAYERS[kernel].products if kernel in LAYERS else per_code


def rows_of(
    machine: str, names: Iterable[str], dtypes: Iterable[str], folder: Path, sources: Path = ROOT
) -> Iterable[Row]:
    """A row for each kernel of a tree of sources, and one for an instruction set that is not counted."""
    here = MACHINES[machine]
    facts = {"machine": machine, "compiler": "", "counter": "", **_facts()}
    not_counted = dict.fromkeys(("dtype", "kernel", "instructions_per_element"), "")
    why_not = here.why_not()
    if why_not is None:
        facts |= here.versions()
        program = here.build(folder / machine, sources)
    layers = [(LAYER_DTYPE, name) for name in names if name in LAYERS]
    others = [(dtype, name) for dtype in dtypes for name in names if name not in LAYERS]
    wanted = {**dict.fromkeys(here.sets, others + layers), **dict.fromkeys(here.layer_sets, layers)}
    for isa in filter(wanted.get, wanted):
        try:
            if why_not is not None:
                raise NotCounted(why_not)
            for dtype, name in wanted[isa]:
                count = per_element(here, program, isa, name, getattr(torch, dtype))
                yield {
                    "instruction_set": isa, "dtype": dtype, "kernel": name,
                    "instructions_per_element": f"{count:.4g}", "not_counted": "", **facts,
                }  # fmt: skip
        except NotCounted as why:
            yield {"instruction_set": isa, **not_counted, "not_counted": str(why), **facts}


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows, with what was counted again in their places, and what was not there before; by instruction set.
    That a set is not counted is said only of sets without counts."""
    rows = {_key(row): row for row in (*old, *new)}
    counted = {_set(row) for row in rows.values() if row["kernel"]}
    sets = [(name, isa) for name, machine in MACHINES.items() for isa in (*machine.sets, *machine.layer_sets)]
    kept = [row for row in rows.values() if row["kernel"] or _set(row) not in counted]
    return sorted(kept, key=lambda row: sets.index(_set(row)) if _set(row) in sets else len(sets))


def _set(row: Row) -> tuple[object, ...]:
    return row["machine"], row["instruction_set"]


def _key(row: Row) -> tuple[object, ...]:
    return *_set(row), row["dtype"], row["kernel"]


def _facts() -> Row:
    found = environment(torch.device("cpu"))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "coarsegrad": found["coarsegrad"], "git": found["git"]}


# --------------------------------------------------------------------------------------- the command

_COLUMNS = "{:<9}{:<12}{:<10}{:<36}{:>12}{:>12}{:>12}{:>12}"
_HEADER = ("machine", "set", "dtype", "kernel", "instructions", "at least", "copy", "measured")


def _line(row: Row, times: list[dict[str, str]], per_cycle: float, ghz: float) -> str:
    if row["not_counted"]:
        return f"{row['machine']:<9}{row['instruction_set']:<12}not counted: {row['not_counted']}"
    names = [str(row[key]) for key in ("machine", "instruction_set", "dtype", "kernel")]
    count, time = float(row["instructions_per_element"]), times_of(times, *names)
    seconds = [least_seconds(count, per_cycle, ghz), *([time.copy, time.measured] if time else [])]
    cells = [f"{1e9 * each:.3f} ns" for each in seconds]
    return _COLUMNS.format(*names, f"{count:.3g}", *cells, *[""] * (3 - len(cells))).rstrip()


_OTHER = ("machine", "set", "dtype", "kernel", "instructions", "other", "ratio", "")


def compare(machines: Iterable[str], names: Iterable[str], dtypes: Iterable[str], folder: Path, checkout: Path) -> str:
    """Prints the counts of both, and returns what takes more instructions than in the checkout."""
    print(_COLUMNS.format(*_OTHER).rstrip())
    more, counted = [], False
    for machine in machines:
        both = (
            rows_of(machine, names, dtypes, folder / of, tree) for of, tree in (("this", ROOT), ("other", checkout))
        )
        for row, other in zip(*both, strict=True):
            if why := row["not_counted"] or other["not_counted"]:
                print(f"{machine:<9}{row['instruction_set']:<12}not counted: {why}", flush=True)
                continue
            case = [str(row[key]) for key in ("machine", "instruction_set", "dtype", "kernel")]
            here, there = (str(each["instructions_per_element"]) for each in (row, other))
            ratio, counted = float(here) / float(there), True
            print(_COLUMNS.format(*case, here, there, f"{ratio:.3f}", "").rstrip(), flush=True)
            if ratio > SLOWER:
                more.append(f"  {', '.join(case)}: {ratio:.3f}")
    if not counted:
        raise BenchError("nothing was counted")
    percent = f"{SLOWER - 1:.0%}"
    if not more:
        return f"Nothing takes over {percent} more instructions than in {checkout}."
    return "\n".join([f"Over {percent} more instructions than in {checkout}:", *more])


def _positive(text: str) -> float:
    try:
        if 0 < (number := float(text)) < float("inf"):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--machines", nargs="+", choices=MACHINES, default=list(MACHINES), help="default: both")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    add(
        "--only", nargs="+", choices=COUNTED, default=COUNTED, metavar="NAME",
        help=f"some of {', '.join(COUNTED)} (default: all)",
    )  # fmt: skip
    add("--per-cycle", type=_positive, default=PER_CYCLE, metavar="N", help=f"default {PER_CYCLE}, as of a Zen 3")
    add("--ghz", type=_positive, default=GHZ, metavar="F", help=f"the clock (default {GHZ})")
    add("--build", type=Path, metavar="FOLDER", help="keep the build in a folder, and use what is there of it")
    add("--against", type=Path, metavar="CHECKOUT", help="count the kernels of another checkout of this project too")
    add("--out", type=Path, metavar="CSV", help=f"default {os.path.relpath(RESULTS)}")
    args = parser.parse_args(argv)
    if args.against and not (args.against / "csrc" / "cpu").is_dir():
        parser.error(f"--against: {args.against} is no checkout, it has no csrc/cpu")
    if args.against and args.out:
        parser.error(f"--out {args.out}: with --against nothing is written")
    out = args.out or RESULTS
    times, rows = rows_in(TIMES), []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.build or Path(scratch)
            if args.against:
                print(compare(args.machines, args.only, args.dtypes, folder, args.against))
                return
            print(_COLUMNS.format(*_HEADER))
            for machine in args.machines:
                for row in rows_of(machine, args.only, args.dtypes, folder):
                    print(_line(row, times, args.per_cycle, args.ghz), flush=True)
                    rows.append(row)
        if all(row["not_counted"] for row in rows):
            raise BenchError("nothing was counted")
        write_csv(merged(rows_in(out), rows), out)
    except (BenchError, OSError) as error:
        raise SystemExit(f"bench.instructions: {error}") from error
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing was written.")
        raise SystemExit(130) from None
    print(f"Written: {out}. `python -m bench.report` shows it in docs/benchmarks.md.")


if __name__ == "__main__":
    main()
