"""The page of experiments: it is made of the committed results, and says of them what they say."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shutil

import pytest
from paths import ROOT

from coarsegrad.experiments import mnist_table, results
from coarsegrad.experiments.files import ExperimentError
from coarsegrad.experiments.table_runs import Run, finished


def test_the_committed_page_is_what_the_command_makes():
    page = ROOT / "docs" / "experiments.md"
    assert results.render(page.read_text(), page.parent) == page.read_text()


def test_the_numbers_of_the_page_on_coarse_gradients():
    text = " ".join((ROOT / "docs" / "estimators.md").read_text().split())
    shown = re.search(r"2-bit activations classifies ([\d.]+)% .*? `clipped_relu` and ([\d.]+)% with `relu`; "
                      r"published are ([\d.]+)% and ([\d.]+)%", text)  # fmt: skip
    done = dict(finished(mnist_table.TABLE, ROOT / "bench" / "results" / "mnist"))
    stes = ("clipped_relu", "relu")
    wanted = [100 * done[Run("full", 2, ste)]["history"][-1]["test_accuracy"] for ste in stes]
    wanted += [mnist_table.TABLE.published[2, ste] for ste in stes]
    assert list(shown.groups()) == [f"{value:.2f}" for value in wanted]


def test_what_the_page_says_of_weights():
    """Of every committed run."""
    done = {run: r for run, r in finished(mnist_table.TABLE, ROOT / "bench/results/mnist") if run.weight_bits}
    assert len(done) >= 55
    last = {run: 100 * result["history"][-1]["test_accuracy"] for run, result in done.items()}
    grew = []
    for run, result in done.items():
        losses = [epoch["loss"] for epoch in result["history"]]
        if run.schedule == "short":
            grew += [(run.rho, epoch) for epoch, loss in enumerate(losses[1:]) if loss >= losses[epoch]]
        assert result["integers"]["differing"] == 0, run
        if run.bits == 4:
            lost = 100 * result["start"]["test_accuracy"] - last[run]
            assert lost <= {1: 0.07, 2: 0.15, 4: 0.15}[run.weight_bits] + 1e-9, run
        if run.weight_bits == 1:
            sizes = [result["integers"][name]["bytes"] for name in ("float", "integer")]
            assert 23 < sizes[0] / sizes[1] < 24
    assert grew == [(1e-5, 0)]
    gains = collections.defaultdict(list)
    for run in done:
        if run.rho and run.schedule == "short":
            gains[run.bits, run.weight_bits].append(last[run] - last[dataclasses.replace(run, rho=None)])
    assert len(gains) == 9 and all(len(seeds) == 3 for seeds in gains.values())
    assert all(0.155 < gain < 0.175 for gain in gains.pop((2, 2)))
    for seeds in gains.values():
        assert min(seeds) < 0 and abs(sum(seeds) / 3) < 0.12


def test_committed_runs_are_of_clean_commits():
    for run, result in finished(mnist_table.TABLE, ROOT / "bench" / "results" / "mnist"):
        assert result["environment"]["git"] and "dirty" not in result["environment"]["git"], run.name


def test_the_command_writes_a_page_anew(tmp_path, capsys):
    for path in (ROOT / "bench" / "results" / "synthetic" / "half").glob("results.json"):
        (tmp_path / "half").mkdir()
        shutil.copy(path, tmp_path / "half")
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- results: synthetic half -->\nold\n<!-- end of results -->\n\nkept\n")
    args = argparse.Namespace(page=page)
    results.main(args)
    text = page.read_text()
    assert text.startswith("# A\n\n<!-- results: synthetic half -->\n\n    bits  ste") and "old" not in text
    assert text.endswith("\n<!-- end of results -->\n\nkept\n") and "updated" in capsys.readouterr().out
    results.main(args)
    assert page.read_text() == text and "unchanged" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["synthetic", "nonsense a b", "mnist folder nonsense", ""])
def test_unknown_words_on_a_page(words, tmp_path):
    with pytest.raises(ExperimentError, match="no results|unknown words"):
        results.render(f"<!-- results: {words} -->\n<!-- end of results -->\n", tmp_path)
