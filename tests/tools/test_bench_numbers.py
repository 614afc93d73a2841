"""bench.numbers and bench.compiled: the tables of docs/numbers.md, and products of FP8 numbers."""

from __future__ import annotations

import re

import pytest
import torch
from bench import compiled, numbers, pages

import coarsegrad as cg
from coarsegrad.testing import backend_ids, serving

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = numbers.PAGE.read_text()


def test_the_page_is_made_of_what_is_found(monkeypatch):
    """But for the errors, which another machine's instruction sets may make smaller."""
    monkeypatch.setattr(numbers, "_ulp_rows", list)
    found = {name: text for name, text in numbers.tables().items() if name != "ulps"}
    found |= compiled.tables(compiled.load())
    assert pages.filled(PAGE, found) == PAGE


@pytest.mark.parametrize("backend", backend_ids())
def test_no_error_of_a_gradient_is_above_that_of_the_page(backend):
    if backend == "triton":
        pytest.skip("the page has none for Triton")
    (table,) = re.findall(r"<!-- table: ulps -->\n(.*?)<!-- end", PAGE, re.DOTALL)
    shown = {
        name: cells for name, *cells in re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", table, re.MULTILINE)
    }
    assert list(shown) == numbers.inexact()
    place = 0 if backend == "reference" else 1
    with serving(backend):
        for ste, cells in shown.items():
            for dtype, cell in zip((*numbers.HALF, torch.float32), cells):
                assert numbers.worst_ulps(ste, dtype) <= float(cell.split(" / ")[place]) + 1e-3


def test_the_nudge_is_what_makes_no_code_too_low():
    """The example of the specification's "without the extra ulp"."""
    alpha, bits = numbers.simplest(torch.float32, 2, high=False)[0], 2
    x = torch.tensor([alpha]).nextafter(torch.tensor(torch.inf))
    naive = (x * (1 / torch.tensor([alpha]))).ceil() * alpha
    assert naive.item() == alpha and cg.qrelu(x, alpha, bits).item() == 2 * alpha


def test_collapsed_levels_are_fixed_points_all_the_same(reference_or_native):
    levels = cg.qrelu(torch.arange(0, 5, 2**-6).bfloat16(), 0.0154, 8).unique()
    assert 1 < levels.numel() < 256 == 2**8
    assert torch.equal(cg.qrelu(levels, 0.0154, 8), levels)


@pytest.mark.parametrize("out", (torch.float32, torch.bfloat16))
def test_fp8_units_multiply_codes_of_four_bits_exactly(out):
    codes, weights = torch.randint(0, 16, (32, 512)), torch.randint(-8, 9, (48, 512))
    a, b = (t.to(torch.float8_e4m3fn) for t in (codes.float(), weights.float()))
    try:
        got = torch._scaled_mm(a, b.T, scale_a=torch.ones(()), scale_b=torch.ones(()), out_dtype=out)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch {torch.__version__} does not multiply FP8 here: {error}")
    assert torch.equal(got, (codes @ weights.T).to(out))


def test_the_passes_of_a_staircase_that_moves_its_levels():
    """In eager code, as the compiled form differs only in what it rounds."""

    def unrounded(x):
        return (
            torch.clamp(
                torch.ceil(
                    x.float() / 0.166,
                ),
                0,
                15,
            )
            * 0.166
        ).bfloat16()

    rows = compiled.measured(4, "compiled", unrounded, torch.randn(4096).bfloat16())
    assert [row["pass"] for row in rows] == list(range(1, compiled.PASSES + 1))
    assert float(rows[1]["moved"]) > 0.1 and rows[1]["levels_moved"] == 1
    still = compiled.measured(4, "QReLU", cg.QReLU(4), torch.randn(4096).bfloat16())
    assert all(float(row["differ"]) == float(row["moved"] or 0) == 0 for row in still)
