"""Mistakes put into a copy of the CUDA kernels, one at a time: the tests of test_cuda_host*.py must notice each."""

from __future__ import annotations

import functools
import shutil

import cuda_host
import pytest
import test_cuda_host as tests
import test_cuda_host_norm as norm_tests
import test_cuda_host_signed as signed_tests
import test_cuda_host_weights as weight_tests
import torch
from paths import ROOT

pytestmark = [
    pytest.mark.costly,
    pytest.mark.skipif(cuda_host.why_not() is not None, reason=str(cuda_host.why_not())),
]

# Few blocks, so that the loops over the grid turn more than once; no mistake by itself.
SMALL_GRID = (
    ("dispatch.cuh", "kMaxBlocks = 1 << 30", "kMaxBlocks = 3"),
    ("dispatch.cuh", "kMaxSums = 4096, kSumBlocks = 4096", "kMaxSums = 2, kSumBlocks = 7"),
)

# A mistake shows in one dtype and in some of the kernels: nothing else need be compiled for it. A copy has a dtype, the
# cases that it runs, and edits that leave calls out: what is not called is not instantiated.
DTYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "f16"}
FROM_X = "launch_backward_x<T>(a, stream, grid, whole);"
FROM_SAVED = (
    "launch_backward_saved<T, false, width.value>(a, stream, grid, whole);",
    "launch_backward_saved<T, true, 2>(a, stream, grid, whole);",
)


def forward(rounding):
    others = [other for other in cuda_host.ROUNDINGS if other != rounding]
    left_out = [
        ("../dispatch.h", f"case Rounding::{other}: return body(Constant<Rounding::{other}>{{}});", "")
        for other in others
    ]
    return (lambda case: case.op == "forward" and case.rounding == rounding), left_out


def is_signed(case):
    """Whether it is of another program."""
    return case.op in ("signed_forward", "hadamard")


def is_weight(case):
    """Whether it is of a third program."""
    return case.op == "weight_scale"


def is_norm(case):
    """Whether it is of a fourth."""
    return case.op == "norm"


COPIES = {
    **{f"forward, {rounding}": (torch.bfloat16, *forward(rounding)) for rounding in cuda_host.ROUNDINGS},
    "forward in float32": (torch.float32, *forward("ceil")),
    "backward from x": (
        torch.bfloat16,
        lambda case: case.op == "backward" and "x" in case.inputs and case.ste == "reverse_exponential",
        [("../dispatch.h", "CG_FOR_EACH_STE(CG_CASE)", "CG_CASE(reverse_exponential, ReverseExponential)")]
        + [("dispatch.cuh", call, "static_cast<void>(whole);") for call in FROM_SAVED],
    ),
    "backward from what is saved": (
        torch.bfloat16,
        lambda case: case.op == "backward" and "x" not in case.inputs,
        [("dispatch.cuh", FROM_X, "static_cast<void>(whole);")],
    ),
    "backward_from_slopes": (torch.bfloat16, lambda case: case.op == "backward_from_slopes", []),
    "signed": (torch.bfloat16, is_signed, []),
    "weights": (torch.bfloat16, is_weight, []),
    # Its own kernel alone.
    "norm": (
        torch.bfloat16,
        is_norm,
        [
            ("norm_dispatch.cuh", f"launch_{after}, scratch, stream)", "static_cast<void>(scratch)")
            for after in ("hadamard(a.rotation", "signed_forward(after")
        ],
    ),
}
# The copies of mutants that are not in the one of their file.
BY_FILE = {"backward.cuh": "backward from what is saved", "reduce.cuh": "backward from what is saved",
           "../math/ste.h": "backward from x", "signed.cuh": "signed", "hadamard.cuh": "signed", "weights.cuh": "weights", "norm.cuh": "norm"}  # fmt: skip
BY_NAME = {
    **dict.fromkeys(
        ("a return before the shuffle", "half a warp in the mask of the bits", "nibbles of a byte swapped",
         "misaligned chunks moved at once"),
        "forward in float32",
    ),
    "the fma of nearest rounds upwards": "forward, nearest",
    ">= for > at a threshold of nearest": "forward, nearest",
    "the dead zone of nearest under hwgq": "forward, hwgq",
    "the end of what is near outside": "forward, ceil",
    "rows of channels that are no chunks": "backward from what is saved",
    **dict.fromkeys(
        ("channels of a chunk that are one", "the channel of another's alpha", "totals that stay where they are",
         "terms of a chunk's channels added up", "the code of NaN in a sum", "any alpha taken for a regular one",
         "dx of the chunk before"),
        "backward from x",
    ),
    **dict.fromkeys(("no barrier in the largest of a block", "half of the lanes of a group"), "signed"),
    **dict.fromkeys(("half of the slopes", "no barrier before the slopes are read"), "backward_from_slopes"),
}  # fmt: skip

# name: (file, what it says, what it says instead). The text must be there once.
MUTANTS = {
    "no barrier in the sum of a block": ("reduce.cuh", "__syncthreads();\n  if (warp == 0)", "if (warp == 0)"),
    "no barrier in the sum of channels": ("reduce.cuh", "__syncthreads();\n    if (threadIdx.x < kWarp", "if (threadIdx.x < kWarp"),
    "half a warp in the mask of a sum": ("reduce.cuh", "__shfl_down_sync(0xffffffffu, v", "__shfl_down_sync(0xffffu, v"),
    "half a warp in the mask of the bits": ("chunk.cuh", "__shfl_down_sync(0xffffffffu, own", "__shfl_down_sync(0xffffu, own"),
    "a return before the shuffle": ("chunk.cuh", "const uint32_t own =", "if (count == 0) return;\n    const uint32_t own ="),
    "a sum of slices that some lanes skip": ("reduce.cuh", "  total = block_sum(total);\n  if (threadIdx.x == 0) grad_alpha", "  if (threadIdx.x >= slices) return;\n  total = block_sum(total);\n  if (threadIdx.x == 0) grad_alpha"),
    "half of the levels of a warp's sum": ("reduce.cuh", "down > 0; down /= 2", "down > 1; down /= 2"),
    "the last short chunk is left out": ("chunk.cuh", "(count + kChunk<T> - 1) / kChunk<T>", "count / kChunk<T>"),
    "the last element is left out": ("chunk.cuh", "left = count - chunk * kChunk<T>", "left = count - 1 - chunk * kChunk<T>"),
    "tiles that are done again": ("chunk.cuh", "tile += gridDim.x * kTile", "tile += kTile"),
    "tiles that are left out": ("chunk.cuh", "tile += gridDim.x * kTile", "tile += 2 * gridDim.x * kTile"),
    "misaligned chunks moved at once": ("dispatch.cuh", "return low % 16 == 0;", "return low < ~uintptr_t{0};"),
    "floor for ceil": ("../math/staircase.h", "max_of(ceil(min_of(u, q)), F(1))", "max_of(F(::floor(min_of(u, q))), F(1))"),
    "the fma of ceil rounds downwards": ("alphas.cuh", "__fmaf_ru", "__fmaf_rd"),
    "the fma of nearest rounds upwards": ("alphas.cuh", "__fmaf_rd(", "__fmaf_ru("),
    "< for <= at a threshold of ceil": ("alphas.cuh", "!(x[i] <= below[i])", "!(x[i] < below[i])"),
    ">= for > at a threshold of nearest": ("alphas.cuh", "over = x[i] > (", "over = x[i] >= ("),
    "the dead zone of nearest under hwgq": ("alphas.cuh", "R == Rounding::hwgq && code[i] == 0", "false"),
    "levels that are not rounded": ("alphas.cuh", "round_levels<T>(below);", ""),
    "no code above the guess's bound": ("alphas.cuh", "kMagic + 1, kMagic + q)", "kMagic + 1, kMagic + q - 1)"),
    "a guess from 0 up": ("alphas.cuh", "kMagic + 1, kMagic + q)", "kMagic, kMagic + q)"),
    "illegal alpha not noticed": ("alphas.cuh", "return alpha > A(0) && alpha < A(INFINITY) ? alpha : A(NAN);", "return alpha;"),
    "alphas of the wrong channels": ("alphas.cuh", "segment % alphas.channels", "start % alphas.channels"),
    "channels that do not start again": ("alphas.cuh", "if (++at_ == end_) at_ = first_;", "++at_;\n      if (at_ == end_) --at_;"),
    "the top level outside": ("forward.cuh", "is_positive(x) & !(x > top)", "is_positive(x) & !(x >= top)"),
    "the end of what is near outside": ("../math/ste.h", "(x > top + half)", "(x >= top + half)"),
    "the gate of NaN shut": ("../math/ste.h", "return !(x <= F(0));", "return x > F(0);"),
    "halves of a word swapped": ("chunk.cuh", "narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16", "narrow<T>(high).bits | static_cast<uint32_t>(narrow<T>(low).bits) << 16"),
    "nibbles of a byte swapped": ("chunk.cuh", "static_cast<uint8_t>(own | next << 4)", "static_cast<uint8_t>(next | own << 4)"),
    "mask bits in reverse": ("forward.cuh", "? 1u << i : 0;", "? 1u << (7 - i) : 0;"),
    "codes in reverse": ("forward.cuh", "for (int i = 3; i >= 0; --i) four", "for (int i = 0; i < 4; ++i) four"),
    "codes of the second half on the first": ("forward.cuh", "<< (first * width)", "<< (first / 2 * width)"),
    "wrong half of a mask word": ("backward.cuh", "(low | high << 16) * 0xffffu", "(high | low << 16) * 0xffffu"),
    "a product for a select": ("../math/ste.h", "return select(slope != F(0), mul(v, slope), F(0));", "return mul(v, slope);"),
    "above taken for inside": ("backward.cuh", "value == 2 ? q : value == 1 ? inside", "value == 2 ? inside : value == 1 ? q"),
    "codes of which the low bits are looked at": ("backward.cuh", "if (kWidth >= 4) any |= any >> 2;", ""),
    "a mask beside the codes that is not read": ("backward.cuh", "masked = !kState && a.kind != MaskKind::nothing", "masked = false"),
    "half of the slopes": ("backward.cuh", "code < 1 << a.bits", "code < 1 << (a.bits - 1)"),
    "no barrier before the slopes are read": ("backward.cuh", "__syncthreads();\n  const auto slope_of", "const auto slope_of"),
    "one partial sum for all blocks": ("reduce.cuh", "partial[blockIdx.x] = total", "partial[0] = total"),
    "slices for channels": ("reduce.cuh", "partial[slice * channels + channel]", "partial[slice + channel * slices]"),
    "elements of the wrong channel": ("reduce.cuh", "unit = outer * row + start + at", "unit = (outer * inner + at) * alphas.channels / kUnit + share.channel"),
    "the second of two units left out": ("reduce.cuh", "if (more) terms.add(second, two, total);", ""),
    "the last unit counted twice": ("reduce.cuh", "if (more) terms.add", "terms.add"),
    "channels of a chunk that are one": ("backward.cuh", "[channel + k], a.rounding", "[channel], a.rounding"),
    "the channel of another's alpha": ("backward.cuh", "[kInnermost ? channel + k : channel]", "[channel]"),
    "totals that stay where they are": ("backward.cuh", "total[kUnit - 1] = first;", "total[kUnit - 1] = first * 0 + total[0];"),
    "terms of a chunk's channels added up": ("backward.cuh", "total[i % kTotals] +=", "total[0] +="),
    "the code of NaN in a sum": ("backward.cuh", "factor = fminf(code[i], q)", "factor = code[i]"),
    "any alpha taken for a regular one": ("backward.cuh", "if (own.is_regular(q)) {", "if (true) {"),
    "dx of the chunk before": ("backward.cuh", "store_chunk<T>(a.grad_x, unit, dx)", "store_chunk<T>(a.grad_x, unit - (unit > 0), dx)"),
    "sums of the wrong part of a chunk": ("reduce.cuh", "to[k] = sum", "to[kUnit - 1 - k] = sum"),
    "alpha of the next run": ("alphas.cuh", "static_cast<uint32_t>(chunk) / run", "static_cast<uint32_t>(chunk + 1) / run"),
    "chunks that straddle channels moved at once": ("dispatch.cuh", "a.alphas.inner % kChunk<T> == 0", "a.alphas.inner > 1"),
    "rows of channels that are no chunks": ("dispatch.cuh", "run % chunk == 0", "run >= chunk"),
    "no barrier in the largest of a block": ("reduce.cuh", "kWarp] = v;\n  __syncthreads();", "kWarp] = v;"),
    "half of the lanes of a group": ("reduce.cuh", "if (apart < lanes)", "if (2 * apart < lanes)"),
    ">= for > at a signed threshold": ("signed.cuh", "over = x[i] > mul(", "over = x[i] >= mul("),
    "sums and differences swapped": ("hadamard.cuh", "& apart ? -1 : 1", "& apart ? 1 : -1"),
    "a lane's largest weight for a warp's": ("weights.cuh", "  largest = largest_of_warp(largest);\n", ""),
    "the last weight of a part left out": ("weights.cuh", "? begin + kPart : a.length", "? begin + kPart - 1 : a.length"),
    "infinity in a row not noticed": ("weights.cuh", " && largest < A(INFINITY)", ""),
    "sums that every lane adds": ("weights.cuh", "if (threadIdx.x % kWarp == 0) add_to(sums.product", "if (true) add_to(sums.product"),
    "of equal scales the last": ("weights.cuh", "if (explained > most) most = explained, best = i;", "if (explained >= most) most = explained, best = i;"),
    "the last group of scales left out": ("weights.cuh", "(grid.count + kTried - 1) / kTried", "grid.count / kTried"),
    "the scale after the best": ("weights.cuh", "grid.divisors[best]", "grid.divisors[best + 1]"),
    "sets of one more": ("weights.cuh", "set{totals[i], i + 1}", "set{totals[i], i + 2}"),
    "of equal sets the largest": ("weights.cuh", "other.square < best.square", "other.square > best.square"),
    "one part for all warps": ("weights.cuh", "* kWarps + threadIdx.x / kWarp, begin", "* kWarps, begin"),
    "warps of a row added one by one": ("norm.cuh", "sum : sum + (from[kWarp] + from[3 * kWarp])", "sum : (sum + from[kWarp]) + from[3 * kWarp]"),
    "the upper lanes of a chunk added first": ("norm.cuh", "odd ? v[2 * i + 1] : v[2 * i], other = odd ? v[2 * i] : v[2 * i + 1];", "odd ? v[i + kCount / 2] : v[i], other = odd ? v[i] : v[i + kCount / 2];"),
    "no barrier in the sum of a row": ("norm.cuh", "= own[i];\n    __syncthreads();", "= own[i];"),
    "elements past the end of a row less the mean": ("norm.cuh", "held[i] - mean : A(0)", "held[i] - mean : A(0) - mean"),
    "the mean still in what is read again": ("norm.cuh", "own[k] -= mean;", "own[k] -= kHeld ? mean : A(0);"),
    "wide parameters taken for x's dtype": ("norm.cuh", "sizeof(T) == 2 && !wide", "sizeof(T) == 2"),
    "one rounding for two": ("norm.cuh", "else round_levels<T>(n);", ""),
    "weight for 1 + weight": ("norm.cuh", "a.shifted ? parameter[i] + A(1) : parameter[i]", "parameter[i]"),
    "a warp's largest for a row's": ("norm.cuh", "if (row.threads > kWarp) largest[0] = largest_of_block(largest[0]);\n  else largest", "largest"),
    "what irregular alphas read left out": ("norm.cuh", "if (!alpha.is_regular(p)) store_chunk<T>(a.y, chunk, words);", ""),
    "the alphas of another row": ("norm.cuh", "staircase.group_alphas[chunk >> group_shift]", "staircase.group_alphas[unit >> group_shift]"),
    "a step over the rows too far": ("reduce.cuh", "at -= inner, ++outer", "at -= inner, outer += 2"),
}  # fmt: skip


@functools.cache
def make_cases(dtype):
    """Some of every kind of case, more than a tile and less than the grid of SMALL_GRID takes at once."""
    cases = list(tests.forward_cases(dtype, (33, 4097), (2, 8)))
    cases += tests.dequantize_cases(dtype, (33, 4097))
    cases += tests.backward_from_slopes_cases(dtype, (33, 4097, 30_000), (1, 3, 8))
    cases += tests.backward_cases(dtype, (33, 4097), (2, 4), ("nearest",))
    channels = [case for case in tests.channel_cases(dtype) if case.channels < 50]  # more take longer
    cases += channels[::3] + [case for case in channels if "x" in case.inputs and case.ste == "reverse_exponential"]
    cases += tests.forward_cases(dtype, (30_000,), (3,))
    cases += tests.backward_cases(dtype, (30_000,), (2,), ("ceil",))
    cases += tests.illegal_alpha_cases(dtype) + tests.select_cases(dtype) + tests.irregular_backward_cases(dtype)
    # Codes whose low bits are zero, with a gate read from them.
    for bits in (3, 4, 8):
        alpha = tests.alpha_tensor([0.5], dtype)
        x = tests.make_x(dtype, 0.5, bits, "ceil", 4097, bits)
        cases.append(tests.backward_case(x, tests.make_grad(dtype, 4097, bits), alpha, bits, "relu", "ceil", "exact"))
    return cases


def make_signed_cases(dtype):
    groups = (((3, 64), 32), ((7, 1000), 1000), ((700, 8), 8))
    cases = [*signed_tests.given_cases(dtype, (33, 4097), (3, 8)), *signed_tests.hadamard_cases(dtype, (2, 128))]
    return cases + list(signed_tests.group_cases(dtype, (3,), groups))


def make_weight_cases(dtype):
    shapes = ((7, 9), (3, 129), (2, 2049), (1, 40_000))
    cases = [*weight_tests.extreme_cases(dtype), *weight_tests.special_cases(dtype)]
    return cases + list(weight_tests.ordinary_cases(dtype, shapes))


def make_norm_cases(dtype):
    """Those that one kernel does."""
    shapes = ((40, 64, 32, 64), (5, 512, None, None), (3, 576, 64, 64), (2, 1024, 128, 128), (2, 4096, 128, 64), (3, 5000, None, 8))  # fmt: skip
    made = [*norm_tests.ordinary(dtype, shapes), *norm_tests.special(dtype)]
    return [arguments.case(seed=n) for n, arguments in enumerate(made)]


def copy_of(name):
    """The copy that a mutant is put into."""
    return BY_NAME.get(name) or BY_FILE.get(MUTANTS[name][0], "forward, ceil")


class Copy:
    """A copy of the sources for one dtype and some of the kernels, built with what is put into it."""

    def __init__(self, root, dtype, runs, left_out):
        makers = {is_signed: make_signed_cases, is_weight: make_weight_cases, is_norm: make_norm_cases}
        make = makers.get(runs, make_cases)
        self.cases = list(filter(runs, make(dtype)))
        self.root, self.build = root / "source", root / "build"
        for name in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / name, self.root / name)
        for name in ("CMakeLists.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        ops = {case.op for case in self.cases}
        edits = [("../dispatch.h", f"case Dtype::{str(other).removeprefix('torch.')}: return body(Tag<{name}>{{}});", "")
                 for other, name in DTYPES.items() if other != dtype]  # fmt: skip
        for edit in (*SMALL_GRID, *edits, *left_out):
            self.replace(*edit)
        programs = {is_signed: "cuda_host_signed", is_weight: "cuda_host_weights", is_norm: "cuda_host_norm"}
        self.program = programs.get(runs, "cuda_host")
        program = f"../../tests/cpp/{self.program}.cpp"
        for op in set(cuda_host.OPS) - ops:
            if f"launch_{op}(" in (self.root / "csrc" / "cuda" / program).read_text():
                self.replace(program, f"launch_{op}(", "static_cast<void>(")
        # Misaligned moves work on a CPU: the sanitizer traps them. It takes longer to compile.
        sanitizer = " -fsanitize=alignment -fsanitize-undefined-trap-on-error" if dtype == torch.float32 else ""
        cuda_host.configure(self.root, self.build, "-O0" + sanitizer)

    def replace(self, name, old, new):
        path = self.root / "csrc" / "cuda" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
        path.write_text(text.replace(old, new))
        return path, text

    def fails(self) -> str | None:
        """What the tests notice: an output, or a message of the program; None if all is well."""
        program = cuda_host.build(self.build, self.program)
        for first in range(0, len(self.cases), 50):  # most mistakes show in the first ones
            some = self.cases[first : first + 50]
            try:
                results = cuda_host.run(program, some)
            except cuda_host.HostRunnerError as error:
                return str(error)
            for case, result in zip(some, results, strict=True):
                if wrong := tests.wrong_outputs(case, result):
                    return f"{wrong[0]} of {case.op}"
        return None


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """One of COPIES, made when it is asked for."""
    made = {}

    def copy_for(name):
        if name not in made:
            made[name] = Copy(tmp_path_factory.mktemp("mutants"), *COPIES[name])
        return made[name]

    return copy_for


# tests/conftest.py runs those of a copy in one process, which makes the copy once.
@pytest.mark.parametrize("name", COPIES, ids=lambda name: f"{name}: no mistake")
def test_a_small_grid_is_no_mistake(copies, name):
    assert copies(name).fails() is None


@pytest.mark.parametrize("name", sorted(MUTANTS, key=copy_of), ids=lambda name: f"{copy_of(name)}: {name}")
def test_mutant_is_caught(copies, name):
    copy = copies(copy_of(name))
    path, text = copy.replace(*MUTANTS[name])
    try:
        noticed = copy.fails()
    finally:
        path.write_text(text)
    assert noticed is not None
    print(f"{name}: {noticed}")
