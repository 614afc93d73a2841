"""What bench.behaviour says of quantizers, and docs/peers.md, which it makes."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from bench import behaviour, pages
from bench.quantizers import QUANTIZERS, Quantizer
from bench.timing import BenchError
from torch import nn

ROWS = behaviour.load()
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_page_is_made_of_the_committed_rows():
    assert list(ROWS) == list(QUANTIZERS)
    page = behaviour.PAGE.read_text()
    assert pages.filled(page, behaviour.tables(ROWS)) == page


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_committed_rows_are_what_is_seen(name):
    quantizer, row = QUANTIZERS[name], ROWS[name]
    ours = row["package"] == "coarsegrad"
    if not quantizer.installed or not (ours or quantizer.version == row["version"]):
        pytest.skip(f"{row['package']} {row['version']} is not installed")
    assert behaviour.observed(quantizer) == {**row, "version": quantizer.version}


class Floor(nn.Module):
    """Rounds down, has a seventeenth level, is not idempotent, counts its calls, and passes no NaN."""

    def __init__(self):
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        hidden = x.nan_to_num(0.3)
        return hidden + ((hidden / behaviour.STEP).floor().clamp(-1, 15) * 0.25 - hidden).detach()


def test_the_probes_tell_a_strange_quantizer():
    row = behaviour.observed(Quantizer("floor", "torch", "torch", lambda step: Floor(), {"rounding": "nearest"}))
    seen = {name: row[name] for name in ("rounding", "levels", "dead_zone", "of_nan", "moved_by_a_forward")}
    assert seen == {
        "rounding": "mixed", "levels": "17: -1 to 15", "dead_zone": "to 0.999023", "of_nan": "1",
        "moved_by_a_forward": "`calls`",
    }  # fmt: skip
    assert row["gradient_far_below"] == row["gradient_far_above"] == "1" and row["gradient_masked"] == "inf"
    assert "from" in row["outputs_that_differ"] and row["kept_bits"] == "64"


def test_a_dtype_that_a_quantizer_refuses():
    class OnlyFloat32(Floor):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return super().forward(x)

    row = behaviour.observed(Quantizer("floor", "torch", "torch", lambda step: OnlyFloat32()))
    assert row["idempotent"].endswith("bfloat16: not taken") and row["off_in_bfloat16"] == ""
    assert row["outputs_that_differ"] == ""


def test_the_command(tmp_path, monkeypatch, capsys):
    """It keeps the rows of what is not installed, and writes no page of results elsewhere."""
    monkeypatch.setattr(behaviour, "PAGE", tmp_path / "peers.md")
    behaviour.PAGE.write_text(pages.DOCS.joinpath("peers.md").read_text())
    out = tmp_path / "behaviour.csv"
    out.write_text(behaviour.RESULTS.read_text())
    absent = Quantizer("aqt IntSymmetric", "no_such_package", "no_such_package", Floor, signed=True)
    monkeypatch.setitem(behaviour.QUANTIZERS, "aqt IntSymmetric", absent)
    behaviour.main(["--out", str(out), "--only", "QReLU", "aqt IntSymmetric"])
    # The row that was observed again is that of the results, which may be of an earlier release.
    here = {"version": importlib.metadata.version("coarsegrad")}
    assert behaviour.load(out) == {**ROWS, "QReLU": {**ROWS["QReLU"], **here}}
    shown = capsys.readouterr().out
    assert "Not installed: aqt IntSymmetric (its row stays)" in shown and str(behaviour.PAGE) not in shown
    behaviour.PAGE.write_text("# Nothing\n")
    with pytest.raises(SystemExit, match="bench.behaviour: the page has no line <!-- table: gradients -->"):
        behaviour.main(["--page"])
    with pytest.raises(SystemExit, match="has no rows"):
        behaviour.main(["--page", "--out", str(tmp_path / "nothing.csv")])


def test_a_block_of_another_name_stays():
    page = "<!-- table: a -->\nold\n<!-- end of table -->\n<!-- table: b -->\nold\n<!-- end of table -->\n"
    assert pages.filled(page, {"b": "new\n"}) == page.replace("b -->\nold", "b -->\n\nnew\n")
    with pytest.raises(BenchError, match="no line <!-- table: c -->"):
        pages.filled(page, {"c": ""})
