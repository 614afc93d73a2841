"""bench.traffic and its table in docs/memory.md. tests/triton_mlp.py compares its counts with what the kernels load."""

from __future__ import annotations

import pytest
from bench import traffic
from bench.pages import filled


def total(kernels):
    return sum(kernel.memory() for kernel in kernels)


def test_the_page_has_its_table():
    page = traffic.PAGE.read_text()
    assert filled(page, {"traffic": traffic.page_table(traffic.BITS)}) == page


@pytest.mark.parametrize("name", traffic.SHAPES)
def test_codes_move_at_most_three_quarters(name):
    rows = {row["way"]: row for row in traffic.rows([name], 4) if row["kernel"] == "all"}
    relu, qrelu, one = (int(row["memory_bytes"]) for row in rows.values())
    assert one <= 0.75 * relu < qrelu


def test_by_hand():
    """One tile of all: each matrix once, and 16 bits of every number but the codes, 4, and the gate, 1."""
    rows, inputs, hidden, outputs = shape = (8, 16, 24, 32)
    kernels = traffic.chain(shape, 4, True)
    weights, codes = 2 * (hidden * inputs + outputs * hidden), rows * hidden // 2
    x, h, out = 2 * rows * inputs, 2 * rows * hidden, 2 * rows * outputs
    # Weights are read twice and made once, x and dout read twice, out and dx written, dh is made and read twice.
    assert total(kernels) == 3 * weights + 3 * x + 3 * out + 3 * h + 3 * codes + 2 * codes // 4
    assert sum(kernel.loaded(64, 64) for kernel in kernels) == total(kernels)
    # With tiles of 4 x 8 the first product reads x three times, and the weight twice.
    first = kernels[0]
    assert first.loaded(4, 8) == 3 * x + 2 * 2 * hidden * inputs + codes + codes // 4


def test_two_factors_by_hand():
    """One tile of all. What is of one activation is there twice; y, its gradient and out are there once."""
    rows, inputs, hidden, outputs = shape = (8, 16, 24, 32)
    weight1, weight2 = 2 * hidden * inputs, 2 * outputs * hidden
    x, h, out, codes = 2 * rows * inputs, 2 * rows * hidden, 2 * rows * outputs, rows * hidden // 2
    every = 6 * weight1 + 3 * weight2 + 4 * x + 5 * x + 3 * out + 6 * h  # dx is made twice, and added up
    one, relu = (traffic.chain(shape, *way, factors=2) for way in ((4, True), (None, False)))
    assert total(one) == every + 8 * codes + 4 * codes // 4
    # gate and up are made, read, and read in the backward; the product is made and read twice, its gradient once.
    assert total(relu) == every + 6 * h + 3 * h + 2 * h


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(traffic, "fill", lambda *_: pytest.fail("a part must not replace the table"))
    traffic.main(["--shapes", "OPT-1.3B, 4,096 tokens", "--bits", "2"])
    assert "one op, 2 bits  all" in capsys.readouterr().out
    for wrong in (["--bits", "9"], ["--shapes", "OPT"]):
        with pytest.raises(SystemExit):
            traffic.main(wrong)
