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


def test_what_the_page_says_of_weights_on_the_full_schedule():
    """Of the runs of seed 0, which most settings have alone."""
    done = {run: r["history"] for run, r in finished(mnist_table.TABLE, ROOT / "bench/results/mnist")
            if run.schedule == "full" and run.ste == "clipped_relu" and run.seed == 0}  # fmt: skip
    last = {run: 100 * history[-1]["test_accuracy"] for run, history in done.items()}
    floats = {run.bits: run for run in done if run.weight_bits is None}
    plain = {(run.bits, run.weight_bits): run for run in done if run.weight_bits and not run.rho}
    blended = {(run.bits, run.weight_bits): run for run in done if run.rho}
    both = plain.keys() & blended.keys()
    assert len(both) == 9

    def lost(bits, weight_bits):
        return last[floats[bits]] - last[plain[bits, weight_bits]]

    text = " ".join((ROOT / "docs" / "experiments.md").read_text().split("### Weights of few bits")[1].split())
    best = [100 * max(epoch["test_accuracy"] for epoch in done[runs[1, 2]]) for runs in (plain, blended)]
    gains = [last[blended[pair]] - last[plain[pair]] for pair in both if pair != (1, 2)]
    shares = [done[blended[pair]][19]["loss"] / done[plain[pair]][19]["loss"]
              for pair in both if pair[0] > 1 and pair[1] < 4]  # fmt: skip
    grows = {run: sum(b["loss"] > a["loss"] for a, b in zip(h, h[1:])) for run, h in done.items()}
    quantized = [count for run, count in grows.items() if run.weight_bits]
    plain_floats = [grows[run] for run in floats.values()]
    for said in (
        f"and {lost(2, 1):.2f} on the full one (seed 0), with 1-bit activations {lost(1, 1):.1f} on both.",
        f"ternary weights have {last[plain[1, 2]]:.2f} in the last one and {best[0]:.2f} in the best.",
        f"it gains nothing: {min(gains):.2f} to {max(gains):.2f} points.",
        f"{last[blended[1, 2]]:.2f} for {last[plain[1, 2]]:.2f}, in the best one {best[1]:.2f} for {best[0]:.2f}.",
        f"that is {min(shares):.1f} to {max(shares):.1f} of the plain one's after 20 epochs.",
        f"in {min(quantized)} to {max(quantized)} of 49, with float weights in {min(plain_floats)} to"
        f" {max(plain_floats)} ",
    ):
        assert said in text


def test_what_the_page_says_of_the_grid():
    table = mnist_table.TABLE
    done = {run: result for run, result in finished(table, ROOT / "bench/results/mnist") if run in table.grid}
    assert len(done) == 108
    last = {(r.bits, r.rounding, r.ste): round(100 * done[r]["history"][-1]["test_accuracy"], 2) for r in done}
    stes, roundings = {run.ste for run in done}, {run.rounding for run in done}
    others = stes - {"identity"}
    at_zero = [last[1, rounding, ste] for rounding in ("ceil", "hwgq") for ste in stes]
    assert min(last[1, "nearest", ste] for ste in stes) >= 98.5
    assert min(last[1, "nearest", ste] for ste in others) > max(at_zero)
    step = [last[1, rounding, "reverse_exponential_step"] for rounding in ("ceil", "hwgq", "nearest")]
    assert step == [94.75, 94.35, 98.80] and min(at_zero) == 94.35
    assert [last[1, rounding, "relu"] for rounding in ("nearest", "ceil", "hwgq")] == [99.05, 95.22, 95.14]
    for run, result in done.items():
        if run.bits == 1:
            low, high = (0.13, 0.30) if run.rounding == "nearest" else (0.44, 0.56)
            assert all(low < 1 - layer["zero"] < high for layer in result["shares"].values()), run
    assert max(abs(last[1, "ceil", ste] - last[1, "hwgq", ste]) for ste in stes) == pytest.approx(0.4)
    gains = [last[2, "nearest", ste] - last[2, "ceil", ste] for ste in stes]
    assert (min(gains), max(gains)) == (pytest.approx(0.04), pytest.approx(0.24))
    fine = {key: value for key, value in last.items() if key[0] >= 3 and key[2] != "identity"}
    assert len(fine) == 60 and (min(fine.values()), max(fine.values())) == (99.31, 99.45)
    for bits, ste in {(bits, ste) for bits, _, ste in fine}:
        assert max(fine[bits, r, ste] for r in roundings) - min(fine[bits, r, ste] for r in roundings) < 0.105
    behind = {
        (bits, rounding): [last[bits, rounding, ste] - last[bits, rounding, "identity"] for ste in others]
        for bits in (2, 3, 4, 6, 8) for rounding in roundings
    }  # fmt: skip
    assert [cell for cell, gaps in behind.items() if min(gaps) < 0] == [(6, "hwgq")]
    del behind[6, "hwgq"]
    gaps = [gap for cell in behind.values() for gap in cell]
    assert (min(gaps), max(gaps)) == (pytest.approx(0.04), pytest.approx(0.33))


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
