"""bench.exports: the page shows the committed results, and the command says what it lacks."""

from __future__ import annotations

import importlib.util

import pytest
from bench import exports
from bench.timing import BenchError


def test_the_page_shows_the_committed_results(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(exports.PAGE.read_text())
    exports.write_page(page, exports.RESULTS)
    assert page.read_text() == exports.PAGE.read_text()
    text = page.read_text()
    assert "| 4 bits | OpenVINO | " in text and "| nn.ReLU | onnxruntime | " in text
    page.write_text("no table")
    with pytest.raises(BenchError, match="has no line <!-- bench.exports -->"):
        exports.write_page(page, exports.RESULTS)


def test_help_and_what_is_missing(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        exports.main(["--help"])
    assert "--no-times" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="not installed: onnx, onnxruntime, openvino, onnxscript"):
        exports.main(["--runs", str(tmp_path)])
