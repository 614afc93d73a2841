"""Tables of runs: resuming, results that stand alone, divergence, and what the summary says."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from interruptions import count_calls
from torch import nn

import coarsegrad as cg
from coarsegrad.experiments import cifar_table, mnist_table, models, table, training
from coarsegrad.experiments.data import Split
from coarsegrad.experiments.table_runs import Run, Schedule, Table, finished, float_folder
from coarsegrad.experiments.table_summary import grid_summary, summary
from coarsegrad.experiments.table_training import project
from coarsegrad.nn import half_gaussian_alpha
from coarsegrad.ste import ALPHA_GRADS

STES = ("identity", "relu", "clipped_relu", "log_tailed_relu", "reverse_exponential", "reverse_exponential_step")
BATCH = 8
RUNS = (Run("full", 2, "relu"), Run("full", 2, "identity"), Run("short", 4, "relu", seed=1),
        Run("short", 4, "relu", "exact", True, seed=1),
        Run("short", 4, "clipped_relu+relu+clipped_relu", seed=1, range_bits=2),
        Run("short", 4, "relu", seed=1, weight_bits=1), Run("short", 4, "relu", seed=1, weight_bits=1, rho=0.5),
        Run("short", 4, "relu", seed=1, weight_bits=2))  # fmt: skip


def small_load(folder):
    """Noise with a bright row whose height is the class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(5 * BATCH) % 10
    x = torch.rand(len(y), 1, 28, 28, generator=generator)
    x[torch.arange(len(y)), 0, 2 * y + 4] = 3
    return Split(x[: 3 * BATCH], y[: 3 * BATCH]), Split(x[3 * BATCH :], y[3 * BATCH :]), "small"


SMALL = Table(
    title="Small",
    network=models.lenet5,
    load=small_load,
    schedules={
        "full": Schedule(epochs=3, lr_drops=(1, 2), float_epochs=2, float_lr_drops=(1,), lr=0.05, batch_size=BATCH),
        "short": Schedule(epochs=1, lr_drops=(), float_epochs=1, float_lr_drops=(), lr=0.05, batch_size=BATCH),
    },
    runs=RUNS,
    published={(2, "relu"): 99.24},
)


def call(small, out, *options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    table.add_arguments(parser, "unused")
    threads = torch.get_num_threads()
    try:
        table.main(small, "small-table", parser.parse_args(["--out", str(out), "--threads", "1", *options]))
    finally:
        torch.set_num_threads(threads)


def outcome(out):
    """The results without what another run of the same may have otherwise: times."""
    read = {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("results.json")}
    for result in read.values():
        for row in result["history"]:
            del row["seconds"]
        for network in ("float", "simulated", "integer") if result.get("integers") else ():
            del result["integers"][network]["batch_seconds"]
    return read


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    call(SMALL, out)
    return out


# ------------------------------------------------------------------------------------------ running


def test_what_it_leaves(whole):
    got = outcome(whole)
    assert got.keys() == {f"{run.name}/results.json" for run in RUNS} | {
        "float-2epochs-seed0/results.json", "float-1epochs-seed1/results.json"}  # fmt: skip
    for run in RUNS:
        result, schedule = got[f"{run.name}/results.json"], SMALL.schedules[run.schedule]
        assert len(result["history"]) == schedule.epochs and not result["diverged"]
        start = got[f"{float_folder(schedule, run.seed)}/results.json"]
        assert result["start"]["weights"] == start["weights"]
        assert result["start"]["test_accuracy"] == start["history"][-1]["test_accuracy"]
        assert result["environment"]["threads"] == 1 and result["config"]["data"] == "small"
        assert (result["features"] is None) == (run.seed != 0)
    rows = list(csv.DictReader((whole / "runs.csv").open()))
    assert [(row["schedule"], row["bits"], row["ste"], row["seed"]) for row in rows] == [
        (run.schedule, str(run.bits), run.ste, str(run.seed)) for run in RUNS]  # fmt: skip
    for row, run in zip(rows, RUNS):
        history = got[f"{run.name}/results.json"]["history"]
        assert float(row["test_accuracy"]) == history[-1]["test_accuracy"]
        best = max(history, key=lambda epoch: epoch["test_accuracy"])
        assert (float(row["best_test_accuracy"]), int(row["best_epoch"])) == (best["test_accuracy"], best["epoch"])
    assert sorted(path.name for path in whole.glob("*.png")) == [
        "accuracy-full.png", "accuracy-short.png", "features-full.png", "weights-short.png"]  # fmt: skip
    alphas = got["short/4bit-relu-exact_alpha-per_channel-seed1/results.json"]["alpha"]
    assert all(alphas[f"act{i}"]["min"] < alphas[f"act{i}"]["max"] for i in (1, 2, 3))
    alphas = got["short/4bit-clipped_relu+relu+clipped_relu-range_of_2bit-seed1/results.json"]["alpha"]
    wanted = half_gaussian_alpha(2) * 3 / 15
    assert all(alphas[f"act{i}"] == dict.fromkeys(_SPREAD, pytest.approx(wanted)) for i in (1, 2, 3))


def test_the_shares_are_those_of_the_network_that_a_run_ends_with(whole, tmp_path):
    run = RUNS[0]
    got = json.loads((whole / run.name / "results.json").read_text())["shares"]
    model = models.quantized(models.lenet5(nn.ReLU), 2, run.ste)
    model.load_state_dict(torch.load(whole / run.name / "checkpoint.pt")["model"])
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, cg.QReLU):
            layer.register_forward_hook(lambda layer, inputs, y, name=name: seen.update({name: (inputs[0] / 0.486603)}))
    model.eval()(small_load(None)[1].x)
    assert got.keys() == seen.keys() == {"act1", "act2", "act3"}
    for name, u in seen.items():
        assert got[name]["zero"] == pytest.approx((u <= 0).double().mean().item(), abs=1e-4)
        assert got[name]["saturated"] == pytest.approx((u > 3).double().mean().item(), abs=1e-4)
        assert 0 < got[name]["saturated"] < got[name]["zero"] < 1


def test_weights_of_few_bits(whole):
    """They are those that a run ends with, as integers, and the blended step has another result than the plain one."""
    runs = RUNS[-3:]
    names = [run.name for run in runs]
    assert names == [
        "short/4bit-relu-1bit_weights-seed1", "short/4bit-relu-1bit_weights-rho0.5-seed1",
        "short/4bit-relu-2bit_weights-seed1"]  # fmt: skip
    rows, ended = dict(zip(RUNS, csv.DictReader((whole / "runs.csv").open()))), {}
    for run in runs:
        result = json.loads((whole / run.name / "results.json").read_text())
        found = result["integers"]
        assert found["differing"] == 0 and found["weight_bits"] == run.weight_bits
        model = models.quantized(models.lenet5(nn.ReLU), 4, "relu", weight_bits=run.weight_bits)
        model.load_state_dict(torch.load(whole / run.name / "checkpoint.pt")["model"])
        ended[run] = model.state_dict()["fc1.parametrizations.weight.original"]
        test = small_load(None)[1]
        accuracy = (model.eval()(test.x).argmax(1) == test.y).double().mean().item()
        assert found["simulated"]["test_accuracy"] == found["integer"]["test_accuracy"] == accuracy
        assert accuracy == result["history"][-1]["test_accuracy"]
        # conv2 and fc1 and fc2 read codes; conv1 stays float
        weights = 20 * 50 * 25 + 800 * 500 + 500 * 10
        least = 4 * 20 * 25 + weights * run.weight_bits / 8
        assert least < found["integer"]["bytes"] < least + 20_000 < found["float"]["bytes"] / 12
        assert float(rows[run]["integer_test_accuracy"]) == accuracy
    assert not torch.equal(ended[runs[0]], ended[runs[1]])


def test_a_grid(tmp_path, capsys):
    """Its runs are trained with their rounding, at that rounding's alpha, and leave the tables of the others alone."""
    run = Run("short", 2, "relu")
    grid = tuple(dataclasses.replace(run, rounding=rounding) for rounding in ("ceil", "nearest"))
    call(dataclasses.replace(SMALL, runs=(run,)), tmp_path)
    names = [path.name for path in tmp_path.glob("*.png")]
    capsys.readouterr()
    call(dataclasses.replace(SMALL, runs=(run,), grid=grid), tmp_path)
    got = outcome(tmp_path)
    shared, own = got["short/2bit-relu-seed0/results.json"], got["short/2bit-relu-nearest-seed0/results.json"]
    assert [result["config"]["rounding"] for result in (shared, own)] == ["ceil", "nearest"]
    assert own["alpha"]["act1"]["mean"] == pytest.approx(half_gaussian_alpha(2, "nearest"))
    assert shared["history"] != own["history"] and shared["features"] and own["features"] is None
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted([*names, "grid.png"])
    of_short, of_grid = capsys.readouterr().out.split("Accuracy on the test images")
    assert "2     relu  yes       1 " in of_short and "nearest   relu" not in of_short and "nearest   relu" in of_grid
    last = [f"{100 * result['history'][-1]['test_accuracy']:.2f}" for result in (shared, own)]
    rows = [line.split() for line in of_grid.splitlines()]
    assert ["ceil", "relu", last[0]] in rows and ["nearest", "relu", last[1]] in rows


def test_an_estimator_for_each_activation():
    float_model = models.lenet5(nn.ReLU)
    model = models.quantized(float_model, 2, "relu+clipped_relu+identity")
    assert [model.act1.ste, model.act2.ste, model.act3.ste] == ["relu", "clipped_relu", "identity"]
    model = models.quantized(float_model, 2, "relu")
    assert [model.act1.ste, model.act2.ste, model.act3.ste] == 3 * ["relu"]
    with pytest.raises(ValueError, match="ste names 2 estimators, wanted one or 3: 'relu\\+relu'"):
        models.quantized(float_model, 2, "relu+relu")


def test_finished_runs_need_no_checkpoint(whole, tmp_path, monkeypatch):
    """Only results.json, as they are committed: nothing finished is trained, new runs start from the same weights."""
    for path in whole.rglob("results.json"):
        (tmp_path / path.relative_to(whole)).parent.mkdir(parents=True)
        shutil.copy(path, tmp_path / path.relative_to(whole))
    steps = count_calls(monkeypatch, training, "train_step")
    call(SMALL, tmp_path)
    assert not steps
    more = dataclasses.replace(SMALL, runs=(*RUNS, Run("full", 4, "clipped_relu")))
    call(more, tmp_path)
    assert len(steps) == 3 * (2 + 3)
    new = json.loads((tmp_path / "full/4bit-clipped_relu-seed0/results.json").read_text())
    assert new["start"] == outcome(whole)["full/2bit-relu-seed0/results.json"]["start"]


# 6 steps in float, 9 of relu, 9 of identity, 3 of the other float network, ...
@pytest.mark.parametrize("stop_at", [4, 16, 28])
def test_ctrl_c_and_resume_give_the_same(whole, tmp_path, monkeypatch, capsys, stop_at):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        count_calls(patch, training, "train_step", stop_at=(stop_at,))
        call(SMALL, tmp_path)
    assert ended.value.code == 130 and "the same command to continue" in capsys.readouterr().out
    call(SMALL, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_runs_at_once_give_the_same(whole, tmp_path, monkeypatch, capsys):
    call(SMALL, tmp_path / "at once", "--jobs", "3")
    assert outcome(tmp_path / "at once") == outcome(whole)
    assert "full/2bit-identity-seed0  quantized 3/3  loss" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        steps = count_calls(patch, training, "train_step", stop_at=(12,))
        call(SMALL, tmp_path / "stopped", "--jobs", "3")
    assert ended.value.code == 130 and len(steps) < 20
    call(SMALL, tmp_path / "stopped", "--jobs", "2")
    assert outcome(tmp_path / "stopped") == outcome(whole)


def test_one_estimator_then_another(tmp_path, monkeypatch):
    """From the rate's first drop on, in a run that is stopped after it too."""

    def step(model, *args):
        layers = [module for module in model.modules() if isinstance(module, cg.QReLU)]
        used.extend({layer.ste for layer in layers})
        if len(used) == stop:
            raise KeyboardInterrupt
        return train_step(model, *args)

    then = dataclasses.replace(SMALL, runs=(Run("full", 2, "relu_then_identity"),))
    train_step = training.train_step
    monkeypatch.setattr(training, "train_step", step)
    used, stop = [], 8
    with pytest.raises(SystemExit):
        call(then, tmp_path / "stopped")  # in the third epoch of three
    stop = None
    call(then, tmp_path / "stopped")
    assert used == 3 * ["relu"] + 8 * ["identity"]
    call(then, tmp_path / "whole")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_that_a_run_diverges_is_a_result(whole, tmp_path, monkeypatch, capsys):
    def step(model, *args):
        loss, right = train_step(model, *args)
        layers = [module for module in model.modules() if isinstance(module, cg.QReLU)]
        if layers and layers[0].ste == "identity":
            steps.append(None)
            loss = loss * (float("nan") if len(steps) == 5 else 1)  # in the second epoch
        return loss, right

    steps, train_step = [], training.train_step
    monkeypatch.setattr(training, "train_step", step)
    call(SMALL, tmp_path)
    got, wanted = outcome(tmp_path), outcome(whole)
    bad = got.pop("full/2bit-identity-seed0/results.json")
    before = wanted.pop("full/2bit-identity-seed0/results.json")["history"]
    assert bad["diverged"] and bad["history"] == before[:1] and bad["features"] is None
    assert got == wanted
    assert "(1 diverged, in epoch 2)" in capsys.readouterr().out
    call(SMALL, tmp_path)
    assert len(steps) == 5


def test_parts_of_a_table(whole, tmp_path, capsys):
    call(SMALL, tmp_path, "--runs", "short/*", "--list")
    assert capsys.readouterr().out.split() == [run.name for run in RUNS[2:]]
    call(SMALL, whole, "--list")
    assert capsys.readouterr().out.count("finished") == len(RUNS)
    with pytest.raises(SystemExit, match="--runs nothing matches no run"):
        call(SMALL, tmp_path, "--runs", "nothing")
    with pytest.raises(SystemExit, match="no run is finished"):
        call(SMALL, tmp_path, "--report")
    call(SMALL, tmp_path, "--runs", "short/*-relu-seed1")
    assert [run for run, _ in finished(SMALL, tmp_path)] == [RUNS[2]]
    printed = capsys.readouterr().out
    assert "Not run: all." in printed
    assert (
        "Not run: at 4 bits `relu-exact_alpha-per_channel`, `clipped_relu+relu+clipped_relu-range_of_2bit`, "
        "`relu-1bit_weights`, `relu-1bit_weights-rho0.5`, `relu-2bit_weights`." in " ".join(printed.split())
    )


def test_results_of_something_else_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    longer = {**SMALL.schedules, "full": dataclasses.replace(SMALL.schedules["full"], epochs=4)}
    with pytest.raises(SystemExit, match="results.json has epochs 3, wanted 4"):
        call(dataclasses.replace(SMALL, schedules=longer), tmp_path, "--report")
    with pytest.raises(SystemExit, match="results.json has data 'small', wanted 'other'"):
        call(dataclasses.replace(SMALL, load=lambda folder: (*small_load(folder)[:2], "other")), tmp_path)
    path = tmp_path / RUNS[0].name / "results.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(SystemExit, match="is not a results file"):
        call(SMALL, tmp_path, "--report")


def test_the_rate_falls_after_the_epochs_named():
    seen = []
    model = nn.Linear(1, 10)

    def step(model, optimizer, x, y):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        return torch.zeros(()), torch.zeros(())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_step", step)
        patch.setattr(training, "save_checkpoint", lambda path, config, parts, history: _stop_after(len(history), 5))
        split = Split(torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64))
        config = {"phase": "p", "epochs": 5, "lr": 0.1, "lr_drops": [2, 4], "batch_size": 2, "seed": 0}
        training.fit(model, split, split, config, Path("nowhere"))
    assert seen == pytest.approx([0.1] * 6 + [0.01] * 6 + [0.001] * 3)


def _stop_after(epochs, last):
    if epochs == last:
        raise KeyboardInterrupt


def test_projection_is_that_of_the_singular_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(40, 5)
    got = project(model, Split(x, torch.arange(40) % 3))
    features = model[:2](x).detach().double()
    centred = features - features.mean(0)
    _, values, vectors = torch.linalg.svd(centred)
    wanted = centred @ vectors[:2].T
    torch.testing.assert_close(torch.tensor(got["points"]).abs().double(), wanted.abs(), rtol=6e-3, atol=1e-3)
    assert got["variance"] == pytest.approx((values[:2].square().sum() / values.square().sum()).item())
    assert got["classes"] == (torch.arange(40) % 3).tolist()


# ------------------------------------------------------------------------------------------ the tables and the page


def made_up(run, *accuracies, weights="one", alpha=0.5):
    history = [{"epoch": i, "test_accuracy": value, "seconds": 1800.0} for i, value in enumerate(accuracies, 1)]
    where = {"cpu": "a CPU", "device": "cpu", "threads": 1, "torch": "2", "backend": "native", "git": "0123456789abc"}
    return run, {
        "diverged": False, "history": history, "environment": where, "alpha": {"act1": dict.fromkeys(_SPREAD, alpha)},
        "start": {"weights": weights, "test_accuracy": 0.994},
    }  # fmt: skip


_SPREAD = ("min", "mean", "max")


def test_summary_means_and_spreads():
    seeds = [Run("short", 2, "relu", seed=seed) for seed in (0, 1, 2)]
    learned = Run("short", 2, "relu", "exact", seed=1)
    small = dataclasses.replace(SMALL, runs=(*seeds, learned, Run("short", 1, "relu")))
    done = [made_up(seeds[0], 0.98, 0.99), made_up(seeds[1], 0.994, 0.992, weights="two"),
            made_up(learned, 0.9, 0.95, alpha=0.25)]  # fmt: skip
    text = "".join(summary(small, "short", done))
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "relu", "yes", "2", "99.10", "+-", "0.14", "99.20", "+-", "0.28", "99.40", "+-", "0.00"] in rows
    assert ["2", "relu", "fixed", "layer", "2", "99.10", "+-", "0.14", "99.20", "+-", "0.28", "0.5"] in rows
    assert ["2", "relu", "exact", "layer", "1", "95.00", "95.00", "0.25"] in rows
    assert "Not run: at 1 bit all; at 2 bits `relu` (seed 2)." in text
    plain = " ".join(text.split())
    assert (
        "3 runs, 6 epochs, 3.0 hours of training, on a CPU, cpu, 1 thread, torch 2, native; coarsegrad at commit "
        "0123456789." in plain
    )
    assert "seed 1 (2) start from more than one float network" in plain and "seed 0" not in plain


def test_summary_of_a_grid():
    grid = tuple(Run("short", bits, "relu", rounding=how) for how, bits in product(("ceil", "hwgq"), (1, 2)))
    done = [made_up(run, 0.5, accuracy) for run, accuracy in zip(grid[:3], (0.9, 0.91, 0.92))]
    done[1][1]["diverged"] = True
    done.append(made_up(Run("short", 8, "relu"), 0.999))
    text = "".join(grid_summary(dataclasses.replace(SMALL, grid=grid), done))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"rounding ste 1 bit 2 bits", "ceil relu 90.00 diverged", "hwgq relu 92.00"} <= set(lines)
    assert "Not run: at 2 bits `relu-hwgq`." in lines and "Seed 0." in text and "99.9" not in text
    assert text.count("3 runs, 6 epochs") == 1


def test_summary_of_weights_of_few_bits():
    def network(bytes, seconds, accuracy):
        return {"test_accuracy": accuracy, "bytes": bytes, "batch_seconds": seconds}

    one_bit = Run("short", 4, "relu", weight_bits=1)
    runs = [
        Run("short", 4, "relu"),
        one_bit,
        *(dataclasses.replace(one_bit, **how) for how in ({"seed": 1}, {"rho": 1e-5})),
    ]
    done = [made_up(run, 0.9, accuracy) for run, accuracy in zip(runs, (0.993, 0.99, 0.992, 0.994))]
    for (_, result), share, differing in zip(done[1:], (20, 30, 25), (0, 3, 1)):
        result["integers"] = {"float": network(614400, 4e-3, 0.994), "integer": network(614400 // share, 1e-3, 0.98),
                              "differing": differing, "weight_bits": 1}  # fmt: skip
    small = dataclasses.replace(SMALL, runs=(*runs, Run("short", 4, "relu", weight_bits=2)))
    rows = [" ".join(line.split()) for line in "".join(summary(small, "short", done)).splitlines()]
    assert "4 relu yes 1 99.30 99.30 99.40" in rows
    assert "4 relu 32 1 99.30 99.30 -0.10" in rows
    assert "4 relu 1 0 2 99.10 +- 0.14 99.10 +- 0.14 -0.30 +- 0.14 98.00 +- 0.00 3 25 1/25.0 0.25x" in rows
    assert "4 relu 1 1e-05 1 99.40 99.40 +0.00 98.00 1 24 1/25.0 0.25x" in rows
    assert any("Not run: at 4 bits `relu-2bit_weights`." in row for row in rows)


def test_summary_of_an_estimator_for_each_layer_and_of_another_range():
    mixed, ranged = Run("full", 2, "relu+clipped_relu+relu"), Run("full", 2, "relu", range_bits=4)
    then = Run("full", 2, "relu_then_clipped_relu")
    done = [made_up(RUNS[0], *[0.98] * 3), made_up(mixed, *[0.99] * 3), made_up(ranged, *[0.97] * 3)]
    done.append(made_up(then, *[0.97] * 3))
    done[1][1]["shares"] = {"act1": {"zero": 0.416, "saturated": 0.05}, "act2": {"zero": 0.5, "saturated": 0.004}}
    text = "".join(summary(dataclasses.replace(SMALL, runs=(RUNS[0], mixed, ranged, then)), "full", done))
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "relu", "yes", "1", "98.00", "98.00", "99.40", "99.24"] in rows
    assert "2 relu+clipped_relu+relu no 1 99.00 99.00 99.40 42 50 5 0".split() in rows
    assert "2 relu_then_clipped_relu no 1 97.00 97.00 99.40".split() in rows
    assert "2, range of 4 relu yes 1 97.00 97.00 99.40".split() in rows
    assert "Not run" not in text


def test_published_numbers_stand_beside_the_full_schedule():
    text = "".join(summary(SMALL, "full", [made_up(RUNS[0], 0.98, 0.99, 0.995), made_up(RUNS[1], *[0.98] * 3)]))
    rows = [line.split() for line in text.splitlines()]
    assert ["2", "relu", "yes", "1", "99.50", "99.50", "99.40", "99.24"] in rows
    assert ["2", "identity", "no", "1", "98.00", "98.00", "99.40"] in rows
    assert " to " not in text
    longer = dataclasses.replace(SMALL.schedules["full"], lr_drops=(1,))
    more = dataclasses.replace(SMALL, schedules={"full": longer})
    text = "".join(summary(more, "full", [made_up(RUNS[0], 0.98, 0.99, 0.994)]))
    assert "epochs 2 to 3 (%)" in text
    assert "2 relu yes 1 99.40 99.40 99.40 99.20 +- 0.28 99.24".split() in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize("name, whole_table", [("mnist", mnist_table.TABLE), *cifar_table.TABLES.items()])
def test_the_grids(name, whole_table):
    names = [run.name for run in whole_table.runs]
    assert len(set(names)) == len(names)
    full = {(run.bits, run.ste) for run in whole_table.runs if run.schedule == "full"}
    bits = (1, 2, 4) if name == "mnist" else (2, 4)
    assert full == set(product(bits, STES)) and whole_table.published.keys() <= full
    if name == "mnist":
        short = {(r.bits, r.ste, r.seed) for r in whole_table.runs if r.schedule == "short" and not r.learn_alpha}
        assert short == set(product(bits, STES, (0, 1, 2)))
        grid = {(r.bits, r.rounding, r.ste) for r in whole_table.grid}
        assert grid == set(product((1, 2, 3, 4, 6, 8), ("ceil", "nearest", "hwgq"), STES))
        assert len(whole_table.grid) == len(grid) and len(set(whole_table.grid) & set(whole_table.runs)) == 18
        assert len({run.name for run in whole_table.all_runs}) == len(whole_table.all_runs)
        weights = {(r.schedule, r.bits, r.weight_bits, r.rho, r.seed) for r in whole_table.runs if r.weight_bits}
        grid = [
            *product(["short"], bits, bits, (None, 1e-5), (0, 1, 2)),
            *product(["full"], bits, bits, (None, 1e-5), [0]),
        ]
        assert weights == set(grid) and len(weights) == 54 + 18
        learned = {(r.learn_alpha, r.per_channel, r.seed) for r in whole_table.runs if r.learn_alpha}
        assert learned == set(product(ALPHA_GRADS, (False, True), (0, 1, 2)))
