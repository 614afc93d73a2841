"""`python -m tools.sass`: compiles the CUDA and Triton kernels, and checks what is promised of their machine code."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator

from coarsegrad._text import format_table

from . import triton_kernels
from .code import SassError
from .gate import ARCHS, HEADER, KERNELS, Report, cuda_reports

_DESCRIPTION = """
Compiles the CUDA kernels, and the Triton kernels if Triton is installed, and checks
of each: no spills and no stack; all numbers in 128-bit accesses; no more registers
and instructions an element than promised. No GPU is needed, and nothing is timed.
"""
_EPILOG = """
Needs nvcc, and nvdisasm and cuobjdump: on the PATH, in $CUDA_HOME/bin or from
`pip install triton`. Cubins stay in build/sass. The exit status is 1 if a promise
is broken and 2 if a kernel does not compile.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sass",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, help="default: all")
    parser.add_argument("--only", metavar="PATTERN", default="*", help='name and dtype, such as "forward*bfloat16"')
    parser.add_argument("--show", action="store_true", help="the instructions of each bulk path too")
    args = parser.parse_args(argv)
    try:
        found = [report for arch in args.arch for report in _reports(arch, args.only)]
        rows = [report.row() for report in found]
        broken = [f"{' '.join(row[:3])}: {line}" for row, each in zip(rows, found) for line in each.broken()]
    except (SassError, OSError) as error:
        print(f"tools.sass: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if not found:
        raise SystemExit(f"tools.sass: no kernel matches {args.only!r}")
    print(format_table(HEADER, rows))
    for report in found if args.show else ():
        print(f"\n{report.kernel.name} {report.kernel.dtype}, {report.arch}")
        for each in report.path.outer:
            print(f"{'@' + each.guard if each.guard else '':>8} {each.opcode} {each.operands}")
    print("\n".join(f"BROKEN  {line}" for line in broken) or "All promises hold.", file=sys.stderr)
    raise SystemExit(bool(broken))


def _reports(arch: str, only: str) -> Iterator[Report]:
    if kernels := [kernel for kernel in KERNELS if _matches(kernel, only)]:
        yield from cuda_reports(arch, kernels)
    if triton_kernels.installed():
        yield from triton_kernels.reports([each for each in triton_kernels.examples() if _matches(each, only)], arch)


def _matches(kernel: object, only: str) -> bool:
    return fnmatch.fnmatch(f"{kernel.name} {kernel.dtype}", only)


if __name__ == "__main__":
    main()
