"""bench.exports: the page shows the committed results, and the command says what it lacks."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from bench import exports
from torch import nn

from coarsegrad.experiments.data import PIXEL_MEAN, PIXEL_STD
from coarsegrad.experiments.models import lenet5


def test_the_page_shows_the_committed_results(tmp_path, monkeypatch):
    text = exports.PAGE.read_text()
    assert "| 4 bits | OpenVINO | " in text and "| nn.ReLU | onnxruntime | " in text
    monkeypatch.setattr(exports, "PAGE", tmp_path / "page.md")
    exports.PAGE.write_text(text)
    exports.main(["--page"])
    assert exports.PAGE.read_text() == text
    with pytest.raises(SystemExit, match="bench.exports: .*none.csv"):
        exports.main(["--page", "--out", str(tmp_path / "none.csv")])


def test_help_and_what_is_missing(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        exports.main(["--help"])
    assert "--no-times" in capsys.readouterr().out
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="not installed: onnx, onnxruntime, openvino, onnxscript"):
        exports.main(["--runs", str(tmp_path)])


def test_the_network_of_pixels_is_the_same():
    model = lenet5(nn.ReLU).eval()
    pixels = torch.randint(0, 256, (4, 1, 28, 28)) / 255
    torch.testing.assert_close(exports._of_pixels(model)(pixels), model((pixels - PIXEL_MEAN) / PIXEL_STD))
